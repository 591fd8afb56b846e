"""What recording traffic costs a request on its way, and the writer's thread afterwards.

python -m gateway.bench_traffic [--requests 20000] [--blocks 300]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from gateway.config import Traffic
from gateway.explain import Record, Step
from gateway.jobs import Job
from gateway.traffic import TrafficRecorder
from policies.budget import Price
from policies.fleet_view import RouteRequest
from replicas.protocol import GenerateRequest, SamplingParams, Usage


def ended(number: int, hashes: tuple[bytes, ...] = ()) -> Record:
    """A request that has been answered."""
    route = RouteRequest(request_id=str(number), prompt_tokens=16 * len(hashes) + 3, hashes=hashes, block_size=16)
    asked = GenerateRequest(request_id=str(number), prompt_token_ids=(1,), sampling=SamplingParams())
    used = Usage(prompt_tokens=route.prompt_tokens, completion_tokens=5, cached_tokens=16)
    job = Job(model="m", request=asked, route=route, max_tokens=9, used=used)
    step = Step(role="answer", model="m", jobs=[job], price=Price(input=10, output=100), ttft_s=0.25)
    record = Record(
        request_id=str(number), gateway="gw", key_id="key_1", key_name="nightly", endpoint="/", asked="auto"
    )
    record.steps.append(step)
    record.status, record.ended_s = 200, 0.5
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--blocks", type=int, default=300, help="of a prompt; all but the last ten are shared")
    chosen = parser.parse_args()
    shared = tuple(number.to_bytes(16, "big") for number in range(max(0, chosen.blocks - 10)))
    with tempfile.TemporaryDirectory() as folder:
        recorder = TrafficRecorder(Traffic(), Path(folder), "gw", b"secret of sixteen")
        records = [
            ended(n, (*shared, *((n * 10 + own + 2**40).to_bytes(16, "big") for own in range(min(10, chosen.blocks)))))
            for n in range(chosen.requests)
        ]
        began = time.thread_time()
        for record in records:
            recorder.add(record, "acme")
        on_path = (time.thread_time() - began) / len(records)
        began = time.process_time()
        recorder.start()
        recorder.close()
        behind = (time.process_time() - began) / max(1, recorder.written)
    print(f"{on_path * 1e6:.1f} us on a request's path")
    print(f"{behind * 1e6:.0f} us of the writer's thread, for {chosen.blocks} blocks")


if __name__ == "__main__":
    main()
