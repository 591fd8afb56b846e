"""A server under comparison: how it is reached, when it gave its first token, and why it did not."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from load.execute import connect
from load.http1 import parse_url
from load.plan import PATHS, Target
from load.processes import Child
from load.units import LoadError
from load.workload import Ask

_PAUSE_S = 0.2
# Answers to a wrong question: asking again would not help. 404 is not among them: Ray Serve says it until it is ready.
_HOPELESS = {400, 401, 403, 422}


class PeerFailed(LoadError):
    """A server that did not start or answer. `log`: the end of what it said."""

    def __init__(self, reason: str, log: list[str] | None = None) -> None:
        super().__init__("\n".join([reason, *(log or [])]))
        self.reason, self.log = reason, log or []


@dataclass(frozen=True, slots=True)
class Served:
    """began: when its start began, on time.monotonic. child: the process to watch, where it is not an instance of ours.

    extra, ends_with_done: see load.plan.Target.
    """

    url: str
    model: str
    began: float
    key: str = field(default="", repr=False)
    extra: Mapping[str, Any] = field(default_factory=dict)
    ends_with_done: bool = True
    child: Child | None = None

    def target(self, *, stream: bool = True) -> Target:
        return Target(
            parse_url(self.url),
            self.model,
            stream=stream,
            api_key=self.key,
            extra=self.extra,
            ends_with_done=self.ends_with_done,
        )


def first_token(served: Served, limit_s: float) -> float:
    """Seconds from the start of the server to its first token. Raises PeerFailed when it dies or the limit is over."""
    deadline = served.began + limit_s
    said = "nobody listens"
    while (left := deadline - time.monotonic()) > 0:
        said = _ask(served.target(), left)
        if not said:
            return time.monotonic() - served.began
        if said.startswith("refused: "):
            break
        if served.child is None:
            time.sleep(_PAUSE_S)
        elif (status := served.child.ended(_PAUSE_S)) is not None:
            raise PeerFailed(f"ended with exit status {status} before its first token", _last_words(served))
    else:
        raise PeerFailed(f"no token within {limit_s:g} s: {said}", _last_words(served))
    raise PeerFailed(said, _last_words(served))


def _last_words(served: Served) -> list[str]:
    return served.child.last_words() if served.child else []


def _ask(target: Target, limit_s: float) -> str:
    """ "" when a token came, else why not."""
    connection = connect(target.origin, timeout_s=max(limit_s, _PAUSE_S))
    headers = {"content-type": "application/json", **target.authorization()}
    try:
        path = target.origin.path + PATHS[target.endpoint]
        connection.request("POST", path, target.body(Ask("Say hello.", 3, 4)), headers)
        response = connection.getresponse()
        if response.status != 200:
            words = response.read(400).decode("utf-8", "replace").strip()
            return f"{'refused: ' if response.status in _HOPELESS else ''}{response.status}: {words}"
        return "" if any(_texts(response)) else "a stream without a token"
    except TimeoutError:
        return "a request was not answered"
    except (OSError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        connection.close()


def _texts(response: http.client.HTTPResponse) -> Iterator[str]:
    for line in response:
        if line.startswith(b"data: {"):
            try:
                choices = json.loads(line[6:]).get("choices") or [{}]
            except ValueError:
                continue
            yield (choices[0].get("delta") or {}).get("content") or ""
