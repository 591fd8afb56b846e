"""What the wire costs: python -m replicas.bench [--requests 2000] [--streams 16] [--tokens 2000]

A fake engine that takes no time runs in a process of its own; this process is the gateway, with asyncio and with
uvloop. Prints one JSON line for each: round trip of a submission (request of 100 tokens to its first chunk), and tokens
a second of all streams together on one connection. Run it alone on the machine: both processes want a core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
from contextlib import aclosing
from multiprocessing.connection import Connection

from replicas.client import ReplicaConnection
from replicas.fake import FakeEngine
from replicas.protocol import GenerateRequest, ReplicaAddress, SamplingParams
from replicas.server import ReplicaServer


def serve(pipe: Connection) -> None:
    """In the child: a replica until the other end of `pipe` goes."""
    server = ReplicaServer(FakeEngine(), replica_id="bench", incarnation="bench-1")
    pipe.send(server.start())
    try:
        pipe.recv()
    except EOFError:
        server.stop()


async def measure(address: ReplicaAddress, requests: int, streams: int, tokens: int) -> dict[str, float]:
    conn = await ReplicaConnection.connect(address, gateway_id="bench")
    prompt = tuple(range(100))

    async def run(name: str, max_tokens: int) -> float:
        """Seconds to the first chunk."""
        sampling = SamplingParams(max_tokens=max_tokens)
        begin, first = time.perf_counter(), 0.0
        request = GenerateRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling)
        async with aclosing(conn.generate(request)) as lists:
            async for _ in lists:
                first = first or time.perf_counter() - begin
        return first

    trips = sorted([await run(f"one-{i}", 1) for i in range(requests)])
    begin = time.perf_counter()
    await asyncio.gather(*(run(f"many-{i}", tokens) for i in range(streams)))
    seconds = time.perf_counter() - begin
    await conn.aclose()
    return {
        "round_trip_p50_us": round(1e6 * trips[len(trips) // 2]),
        "round_trip_p99_us": round(1e6 * trips[int(len(trips) * 0.99)]),
        "streams": streams,
        "tokens_per_s": round(streams * tokens / seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("requests", 2000), ("streams", 16), ("tokens", 2000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipe, child_end = context.Pipe()
    child = context.Process(target=serve, args=(child_end,), daemon=True)
    child.start()
    child_end.close()
    address = pipe.recv()
    loops = {"asyncio": asyncio.new_event_loop}
    try:
        import uvloop

        loops["uvloop"] = uvloop.new_event_loop
    except ImportError:
        pass
    for name, factory in loops.items():
        with asyncio.Runner(loop_factory=factory) as runner:
            found = runner.run(measure(address, options.requests, options.streams, options.tokens))
        print(json.dumps({"loop": name, **found}), flush=True)
    pipe.close()
    child.join(5)


if __name__ == "__main__":
    main()
