"""Latency of reserving and settling: `python -m gateway.ledger.bench [--database URL] [--seconds S]`.

At concurrency 1, 16 and 100, each worker reserves, settles, waits for both, and begins anew. Printed are the
percentiles of `reserve` and of the time until a settlement is committed, and the wall time per request, which is what
one request costs when they are grouped. Without --database a new SQLite file in the temporary directory is used, and
the server behind DATABASE_URL as well, if that is set.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from pathlib import Path

from gateway.db.database import Database
from gateway.ledger.entries import Reservation, Spend
from gateway.ledger.ledger import Ledger
from policies.budget import Budget, Budgets, Price, Scope, Subject, Window, pico_usd
from policies.limits import RateLimit, RateLimits
from replicas.protocol import Usage

_PRICE = Price.per_million(input="0.1", cached_input="0.05", output="0.4")
_USAGE = Usage(prompt_tokens=300, completion_tokens=64, cached_tokens=100)
_SUBJECT = Subject("key-1", "team-1", "model")
_BUDGETS = Budgets(
    (
        Budget(scope=Scope(key="*"), window=Window.DAY, usd=pico_usd(1_000_000)),
        Budget(scope=Scope(team="team-1"), window=Window.MONTH, usd=pico_usd(1_000_000), alerts=(5000, 8000)),
    )
)
_LIMITS = RateLimits((RateLimit(scope=Scope(key="*"), requests=10**9, tokens=10**11),))


async def measure(
    url: str, concurrency: int, seconds: float, *, limits: bool
) -> tuple[list[float], list[float], float]:
    """Sorted latencies of reserve and of settle, and seconds of wall time per request."""
    database = Database(url)
    ledger = Ledger(database, f"bench-{time.monotonic_ns()}")
    reserves: list[float] = []
    settles: list[float] = []
    await ledger.start()
    gates = _LIMITS.applying(_SUBJECT) if limits else ()
    began = time.perf_counter()
    until = began + seconds

    async def settle(reservation: Reservation) -> None:
        start = time.perf_counter()
        assert await ledger.settle(reservation, _USAGE)
        settles.append(time.perf_counter() - start)

    async def work(worker: int) -> None:
        number = 0
        while (start := time.perf_counter()) < until:
            number += 1
            spend = Spend(
                request_id=f"{ledger.gateway_id}-{worker}-{number}",
                subject=_SUBJECT,
                prompt_tokens=300,
                max_tokens=64,
                price=_PRICE,
            )
            reservation = await ledger.reserve(spend, _BUDGETS.accounts(_SUBJECT), gates)
            reserves.append(time.perf_counter() - start)
            await settle(reservation)

    await asyncio.gather(*(work(worker) for worker in range(concurrency)))
    wall = time.perf_counter() - began
    await ledger.aclose()
    database.close()
    return sorted(reserves), sorted(settles), wall / len(reserves)


def _line(name: str, concurrency: int, reserves: list[float], settles: list[float], each: float) -> str:
    cells = [f"{times[int(len(times) * at)] * 1e3:9.3f}" for times in (reserves, settles) for at in (0.5, 0.99)]
    return f"{name:24} {concurrency:5} {''.join(cells)} {each * 1e3:9.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--database", help="SQLAlchemy URL; its tables are made if missing")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        urls = [given.database] if given.database else [f"sqlite:///{Path(folder) / 'bench.db'}"]
        if not given.database and os.environ.get("DATABASE_URL"):
            urls.append(os.environ["DATABASE_URL"])
        print("milliseconds             users  reserve: p50  p99  settle: p50  p99  each")
        for url in urls:
            for limits in (False, True):
                name = f"{url.partition(':')[0].partition('+')[0]}, {'budgets + limits' if limits else '2 budgets'}"
                for concurrency in (1, 16, 100):
                    print(
                        _line(name, concurrency, *asyncio.run(measure(url, concurrency, given.seconds, limits=limits)))
                    )


if __name__ == "__main__":
    main()
