"""A policy that would break the SLA is refused by the gate, and forced through as a canary it does break it.

    python -m load.check_gate --dir DIR

Two fake models stand behind the name `chat`: a quick one that answers, and a cheaper slow one. Traffic of several keys
is recorded; a candidate that saves money with the slow model is published with the gate `ttft_p95<=+10%`, which must
refuse it. Then it is published as a canary under a gate that lets anything pass, so that what was foretold is kept; its
own keys must meet a p95 TTFT more than 10 % above the others', and `signalbox policy score` shows what came true.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from load.check_prediction import Instance, started

FLEET = """\
models:
  - name: quick
    engine: fake
    num_cpus: 0.1
    replicas: {min: 2, max: 2}
    price: {input: 1.0, output: 4.0}
    engine_settings: {prefill_tokens_per_s: 8000, tokens_per_s: 100, num_blocks: 4000}
  - name: slow
    engine: fake
    num_cpus: 0.1
    replicas: {min: 2, max: 2}
    price: {input: 0.1, output: 0.4}
    engine_settings: {prefill_tokens_per_s: 1000, tokens_per_s: 100, num_blocks: 4000}
gateway: {num_cpus: 0.1}
"""
SERVING = "groups: {chat: {models: [quick, slow]}}\n"
CANDIDATE = "groups: {chat: {models: [slow, quick]}}\n"
GATE, ANYTHING = "ttft_p95<=+10% cost<=+0%", "ttft_p95<=+100000%"
KEYS = 8
BROKEN = 0.10  # what the SLA allows p95 TTFT to grow by


def traffic(instance: Instance, keys: list[str], seconds: float, rate: float, seed: int) -> None:
    """All keys at once, each from a generator of its own."""
    runs = []
    for number, key in enumerate(keys):
        out = instance.home / f"run-{seed}-{number}.json"
        command = [
            *("load", "run", instance.url, "--model", "chat", "--rate", f"{rate}", "--duration", f"{seconds:g}s"),
            *("--prompt-tokens", "uniform:10,40", "--output-tokens", "uniform:4,16", "--seed", f"{seed + number}"),
            *("--no-metrics", "--warmup", "none", "--output", str(out)),
        ]
        runs.append(instance.start(*command, api_key=key))
    for run in runs:
        run.communicate(timeout=seconds + 90)


def recorded(instance: Instance, at_least: int) -> None:
    """Until the gateway's writer has written so many requests."""
    for _ in range(50):
        shown = instance.command("policy", "traffic", check=False).stdout
        words = shown.split(" requests from ")[0].split()
        if words and words[-1].isdigit() and int(words[-1]) >= at_least:
            return
        time.sleep(0.2)
    raise SystemExit(f"fewer than {at_least} requests were recorded: {shown}")


def check(folder: Path, seconds: float, rate: float) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    serving, candidate = folder / "serving.yaml", folder / "candidate.yaml"
    serving.write_text(SERVING)
    candidate.write_text(CANDIDATE)
    expected = int(KEYS * rate * seconds * 0.7)
    with started(folder, FLEET, replicas=4) as instance:
        instance.command("policy", "publish", str(serving), "--why", "to begin with")
        keys = [instance.command("keys", "create", f"caller-{n}").stdout.split()[-1] for n in range(KEYS)]
        traffic(instance, keys, seconds, rate, 1)
        recorded(instance, expected)
        refused = instance.command("policy", "publish", str(candidate), "--gate", GATE, "--since", "1h", check=False)
        print(refused.stdout, refused.stderr, sep="")
        forced = instance.command("policy", "publish", str(candidate), "--gate", ANYTHING, "--canary", "50%")
        print(forced.stdout)
        traffic(instance, keys, seconds, rate, 100)
        recorded(instance, 2 * expected)
        out = folder / "score.json"
        print(instance.command("policy", "score", "2", "--json", str(out)).stdout)
        instance.command("policy", "cancel", "--why", "it breaks the SLA")
        print(instance.command("policy", "audit", "--json").stdout.count('"refused"'), "refusal in the audit log")
    figures = {one["name"]: one for one in json.loads(out.read_text())}
    ttft = figures["ttft_p95"]["measured"]["value"]
    print(
        f"the gate's exit status was {refused.returncode}; the canary's p95 TTFT is {ttft * 100:+.0f} % to the others'"
    )
    return refused.returncode == 1 and "ttft_p95" in refused.stderr and ttft > BROKEN


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of the two loads (20)")
    parser.add_argument("--rate", type=float, default=1.5, help="requests a second of each key (1.5)")
    chosen = parser.parse_args(arguments)
    try:
        met = check(chosen.dir.resolve(), chosen.seconds, chosen.rate)
    except subprocess.TimeoutExpired:
        print("a load generator did not end", file=sys.stderr)
        return 1
    print("met" if met else "NOT met")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
