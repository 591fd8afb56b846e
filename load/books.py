"""An instance's database as a stranger reads it: what its ledger says, in plain SQL, and a watch over its caps.

Deliberately built on nothing of the gateway's: what is checked must not be read by what is being checked.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_LOOK_S = 0.002


@dataclass(frozen=True, slots=True)
class Row:
    """One attempt of a request on the books. cost, reserved: pico-dollars. estimated: 1 where it is marked so.

    unbilled: tokens that were made beyond completion_tokens, and that nobody pays.
    """

    id: str
    key: str
    state: str
    source: str
    prompt_tokens: int
    max_tokens: int
    completion_tokens: int
    cost: int
    estimated: int
    reserved: int
    unbilled: int


class Books:
    """One connection of its own, for one thread at a time."""

    def __init__(self, url: str) -> None:
        self._connection: Any
        if url.startswith("sqlite"):
            path = urlsplit(url).path
            self._connection = sqlite3.connect(
                f"file:{path[1:]}?mode=ro", uri=True, timeout=10, check_same_thread=False
            )
        else:
            import psycopg

            self._connection = psycopg.connect(url.replace("+psycopg", "", 1), autocommit=True)

    def close(self) -> None:
        self._connection.close()

    def _all(self, query: str) -> list[Any]:
        return list(self._connection.execute(query).fetchall())

    def accounts(self) -> list[tuple[str, int, int, int | None, int, int, int | None]]:
        """(account, spent, reserved, cap) in pico-dollars, then the three in tokens."""
        return self._all(
            "SELECT account, spent_usd, reserved_usd, cap_usd, spent_tokens, reserved_tokens, cap_tokens"
            " FROM ledger_accounts"
        )

    def requests(self) -> list[Row]:
        rows = self._all(
            "SELECT id, key, state, source, prompt_tokens, max_tokens, completion_tokens, cost_usd, estimated,"
            " reserved_usd, unbilled_tokens FROM ledger_requests"
        )
        return [Row(*row) for row in rows]

    def reserving(self) -> set[str]:
        """Gateways that have something reserved."""
        return {row[0] for row in self._all("SELECT DISTINCT gateway_id FROM ledger_requests WHERE state='open'")}


@dataclass
class Watch:
    """Looks at every account all the time, in a thread of its own. breaches: moments at which a cap was passed."""

    url: str
    looks: int = 0
    breaches: list[str] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._run, name="watch-caps", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        assert self._thread is not None, "entered before"
        self._thread.join()

    def _run(self) -> None:
        books = Books(self.url)
        try:
            while not self._over.is_set():
                self.breaches += breaches(books.accounts())
                self.looks += 1
                time.sleep(_LOOK_S)
        except Exception as error:
            self.breaches.append(f"the watch ended: {error}")
        finally:
            books.close()


def breaches(accounts: Sequence[tuple[str, int, int, int | None, int, int, int | None]]) -> list[str]:
    """Accounts whose spent + reserved is above the cap."""
    found = []
    for account, spent, reserved, cap, spent_tokens, reserved_tokens, cap_tokens in accounts:
        if cap is not None and spent + reserved > cap:
            found.append(f"{account}: {spent} + {reserved} pico-dollars of {cap}")
        if cap_tokens is not None and spent_tokens + reserved_tokens > cap_tokens:
            found.append(f"{account}: {spent_tokens} + {reserved_tokens} tokens of {cap_tokens}")
    return found
