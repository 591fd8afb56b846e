"""Prediction against reality: one live run calibrates the simulator, which then tells three others beforehand.

    python -m load.check_prediction --dir DIR              # some eight minutes
    python -m load.check_prediction --dir DIR --report     # judge once more what lies there

Two replicas of the default model with one thread each and a gateway run on this machine. First comes the run that the
simulator may learn from, and a kill that tells how long a replica takes to come back. Then three scenarios take turns,
three times each, with the same requests at the same times (other words each time, so that no run finds the cache of
another); `signalbox simulate run` predicts each from the calibrated model alone. A figure holds if prediction and mean
differ by no more than 15 % or twice the spread of the three runs, whichever is more. Exit status 1 if one does not.
`--fake` does the same with engines that compute nothing, where the machine's other work does not disturb.
With `--within 240` no run is begun that would not end in 240 s; the same command goes on where it stopped (status 3).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

Json = dict[str, Any]

BLOCK = 16
VOCABULARY = 40_000
REPEATS = 3
STARTS_S = 1.5  # from calling the load generator to its first request
TOLERANCE, SPREADS = 0.15, 2.0
FIGURES = ("ttft_p50_s", "ttft_p95_s", "requests_per_s", "hit_rate")
FLEET = """\
models:
  - name: smollm2-135m-instruct
    source: smollm2-135m-instruct
    num_cpus: 0.5
    replicas: {min: 2, max: 2}
    engine_settings: {num_threads: 1, num_blocks: 2500, max_model_len: 2048}
gateway: {num_cpus: 0.25}
"""


# The same with the engine that keeps a time-table instead of computing: what is left is queues, caches and routing.
FAKE_FLEET = """\
models:
  - name: smollm2-135m-instruct
    engine: fake
    tokenizer: smollm2-135m-instruct
    num_cpus: 0.1
    replicas: {min: 2, max: 2}
    engine_settings: {prefill_tokens_per_s: 400, tokens_per_s: 30, num_blocks: 2500, max_model_len: 2048}
gateway: {num_cpus: 0.1}
"""


@dataclass(frozen=True)
class Scenario:
    """Traffic of `rate` requests a second: `shared` blocks of one of `groups` prefixes, then own tokens."""

    name: str
    rate: float
    seconds: float
    groups: int
    shared: int
    own: tuple[int, int]
    output: tuple[int, int]
    kill_at_s: float | None = None
    seed: int = 1


CALIBRATE = Scenario("calibrate", 1.2, 60.0, 6, 6, (24, 200), (6, 40))
SCENARIOS = (
    Scenario("rate", 0.8, 38.0, 6, 6, (24, 200), (6, 40), seed=2),
    Scenario("trace", 0.7, 38.0, 4, 20, (16, 64), (12, 50), seed=3),
    Scenario("killed", 0.8, 38.0, 6, 6, (24, 200), (6, 40), kill_at_s=12.0, seed=4),
)
WARM = Scenario("warm", 2.0, 5.0, 2, 6, (24, 200), (6, 40))


def traffic(scenario: Scenario) -> Iterator[Json]:
    """Recorded traffic, as `policies.traces` reads it. Poisson arrivals."""
    rng = random.Random(scenario.seed)
    at, number = 0.0, 0
    while (at := at + rng.expovariate(scenario.rate)) < scenario.seconds:
        group, number = rng.randrange(scenario.groups), number + 1
        own = rng.randint(*scenario.own)
        prompt = scenario.shared * BLOCK + own
        hashes = [f"{group:04x}{block:04x}" for block in range(scenario.shared)]
        hashes += [f"{0x10000 + number:08x}{block:04x}" for block in range(-(-own // BLOCK))]
        output = rng.randint(*scenario.output)
        yield {
            "time": at,
            "prompt_tokens": prompt,
            "output_tokens": output,
            "block_tokens": BLOCK,
            "hashes": hashes,
        }


# --------------------------------------------------------------------------------------------------------- the instance


@dataclass(frozen=True)
class Instance:
    home: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        run = self.start(*arguments)
        out, err = run.communicate()
        if check and run.returncode:
            raise SystemExit(f"signalbox {' '.join(arguments)}: {err or out}")
        return subprocess.CompletedProcess(arguments, run.returncode, out, err)

    def start(self, *arguments: str, api_key: str = "") -> subprocess.Popen[str]:
        """A `signalbox` command of this instance's home; by default with its first key."""
        environment = {**os.environ, "SIGNALBOX_HOME": str(self.home), "COLUMNS": "150"}
        first = self.home / "first-key"
        if api_key or first.exists():
            environment["SIGNALBOX_API_KEY"] = api_key or first.read_text().strip()
        return subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ready(self) -> int:
        try:
            answer = httpx.get(f"{self.url}/health", timeout=5).json()
            return sum(answer["ready_replicas"].values())
        except (httpx.HTTPError, ValueError, KeyError):
            return 0

    def await_ready(self, count: int, within_s: float = 120.0) -> float:
        """Seconds until so many replicas take work."""
        began = time.monotonic()
        while self.ready() != count:
            if time.monotonic() - began > within_s:
                raise SystemExit(f"{count} replicas were not ready within {within_s:g} s")
            time.sleep(0.1)
        return time.monotonic() - began

    def kill_replica(self) -> None:
        """SIGKILL for the process behind the first replica."""
        replicas = json.loads(self.command("status", "--json").stdout)["replicas"]
        endpoint = min(one["endpoint"] for one in replicas if one["state"] == "ready")
        os.kill(_listener(int(endpoint.rsplit(":", 1)[1])), signal.SIGKILL)


def _listener(port: int) -> int:
    """The process that listens on a port of this machine."""
    wanted = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and int(columns[1].rsplit(":", 1)[1], 16) == port:
                wanted.add(f"socket:[{columns[9]}]")
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if any(os.readlink(link) in wanted for link in (folder / "fd").iterdir()):
                    return int(folder.name)
            except OSError:
                continue
    raise SystemExit(f"nobody listens on port {port}")


@contextmanager
def started(folder: Path, text: str, replicas: int) -> Iterator[Instance]:
    """An instance of the fleet file `text` with a home of its own below the folder; taken down at the end."""
    home = folder / "home"
    home.mkdir(parents=True, exist_ok=True)
    fleet = folder / "fleet.yaml"
    fleet.write_text(text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        instance = Instance(home, free.getsockname()[1])
    instance.command("up", str(fleet), "--detach", "--port", str(instance.port))
    try:
        instance.await_ready(replicas)
        yield instance
    finally:
        instance.command("down", check=False)


# ------------------------------------------------------------------------------------------------------------- the runs


def send(instance: Instance, trace: Path, out: Path, seed: int) -> Json:
    """One live run; its figures."""
    ran = instance.command(
        *("load", "run", instance.url, "--trace", str(trace), "--endpoint", "completions"),
        *("--token-ids", str(VOCABULARY), "--ignore-eos", "--warmup", "none", "--seed", str(seed)),
        *("--no-metrics", "--output", str(out)),
        check=False,
    )
    if not out.exists():
        raise SystemExit(f"the run left no result: {ran.stderr or ran.stdout}")
    return live_figures(json.loads(out.read_text())["runs"][0])


def live_figures(run: Mapping[str, Any]) -> Json:
    """By the simulator's definitions: over completed requests, from the first arrival to the last end."""
    rows = {name: np.array(run["requests"][name]) for name in ("scheduled", "prompt_tokens", "cached_tokens", "error")}
    first, end = (np.array(run["requests"][name], dtype=float) for name in ("first", "end"))
    good = (rows["error"] == "") & ~np.isnan(first)
    ttft = (first - rows["scheduled"])[good]
    span = float(end[good].max() - rows["scheduled"].min())
    return {
        "completed": int(good.sum()),
        "failed": int((rows["error"] != "").sum()),
        "ttft_p50_s": float(np.percentile(ttft, 50)),
        "ttft_p95_s": float(np.percentile(ttft, 95)),
        "requests_per_s": float(good.sum() / span),
        "hit_rate": float(rows["cached_tokens"][good].sum() / rows["prompt_tokens"][good].sum()),
        "kept_up": run["generator"]["kept_up"],
    }


def write_trace(folder: Path, scenario: Scenario) -> Path:
    path = folder / f"{scenario.name}.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in traffic(scenario)))
    return path


def measure(folder: Path, fleet: str, within_s: float) -> bool:
    """The live runs that are not there yet, on one instance; whether all are there then."""
    began, kept = time.monotonic(), folder / "live.json"
    found: dict[str, list[Json]] = json.loads(kept.read_text()) if kept.exists() else {}
    with started(folder, fleet, 2) as instance:
        send(instance, write_trace(folder, WARM), folder / "warm.json", secrets.randbelow(10**6) + 1000)
        if not found:
            found["calibrate"] = [learn(instance, folder)]
            kept.write_text(json.dumps(found))
        for repeat in range(REPEATS):
            for scenario in SCENARIOS:
                runs = found.setdefault(scenario.name, [])
                if len(runs) > repeat:
                    continue
                if time.monotonic() - began + scenario.seconds + 8 > within_s:
                    return False
                runs.append(live(instance, folder, scenario, repeat))
                kept.write_text(json.dumps(found))
    return True


def learn(instance: Instance, folder: Path) -> Json:
    """The run to calibrate on, and the seconds for which a killed replica is away."""
    figures = send(instance, write_trace(folder, CALIBRATE), folder / "calibrate.json", 1)
    instance.kill_replica()
    instance.await_ready(1)
    figures["down_s"] = instance.await_ready(2)
    print(f"calibrate: {json.dumps(figures)}", flush=True)
    return figures


def live(instance: Instance, folder: Path, scenario: Scenario, repeat: int) -> Json:
    """One run of a scenario, with words of its own."""
    killer = None
    if scenario.kill_at_s is not None:
        killer = threading.Timer(scenario.kill_at_s + STARTS_S, instance.kill_replica)
        killer.start()
    out = folder / f"{scenario.name}.{repeat}.json"
    figures = send(instance, write_trace(folder, scenario), out, 100 * scenario.seed + repeat)
    print(f"{scenario.name} {repeat}: {json.dumps(figures)}", flush=True)
    if killer is not None:
        killer.join()
        instance.await_ready(2)
    return figures


def calibrate(folder: Path) -> None:
    """From the first run and its trace alone."""
    ran = Instance(folder / "home", 0).command(
        *("simulate", "calibrate", str(folder / "calibrate.json"), "--trace", str(folder / "calibrate.jsonl")),
        *("--fleet", str(folder / "fleet.yaml"), "--out", str(folder / "model.json")),
    )
    print(ran.stdout.strip())


def predict(folder: Path, scenario: Scenario) -> Json:
    """From the calibrated model alone."""
    out = folder / f"{scenario.name}.predicted.json"
    outage = []
    if scenario.kill_at_s is not None:
        down_s = json.loads((folder / "live.json").read_text())["calibrate"][0]["down_s"]
        outage = ["--outage", f"0@{scenario.kill_at_s:g}:{down_s:.2f}"]
    Instance(folder / "home", 0).command(
        *("simulate", "run", "--trace", str(write_trace(folder, scenario)), "--replica", str(folder / "model.json")),
        *("--fleet", str(folder / "fleet.yaml"), "--json", str(out), *outage),
    )
    found: Json = json.loads(out.read_text())
    return found


# --------------------------------------------------------------------------------------------------------------- report


def judge(predicted: float, measured: list[float]) -> tuple[float, float, bool]:
    """(mean of the runs, how far a prediction may be from it, whether it is not further)."""
    mean = sum(measured) / len(measured)
    allowed = max(TOLERANCE * mean, SPREADS * (max(measured) - min(measured)))
    return mean, allowed, abs(predicted - mean) <= allowed


def report(folder: Path) -> bool:
    print(f"{'scenario':10} {'figure':16} {'predicted':>10} {'measured':>10} {'apart':>7} {'allowed':>8}  runs")
    found = json.loads((folder / "live.json").read_text())
    well, rows = True, []
    for scenario in SCENARIOS:
        runs, told = found[scenario.name], predict(folder, scenario)
        for figure in FIGURES:
            values = [run[figure] for run in runs]
            mean, allowed, good = judge(told[figure], values)
            well &= good
            shown = " ".join(f"{value:.3f}" for value in values)
            print(
                f"{scenario.name:10} {figure:16} {told[figure]:10.3f} {mean:10.3f} {told[figure] / mean - 1:+7.1%} "
                f"{allowed / mean:8.1%}  {shown}{'' if good else '   MISSED'}"
            )
            rows.append({"scenario": scenario.name, "figure": figure, "predicted": told[figure], "runs": values})
    (folder / "report.json").write_text(json.dumps({"met": well, "rows": rows}, indent=2))
    return well


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="where runs, model and report are kept")
    parser.add_argument("--report", action="store_true", help="only judge the runs that lie there")
    parser.add_argument("--fake", action="store_true", help="with engines that keep a time-table and compute nothing")
    parser.add_argument("--within", type=float, default=math.inf, help="seconds after which to stop, and go on later")
    chosen = parser.parse_args(arguments)
    folder: Path = chosen.dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not chosen.report:
        if not measure(folder, FAKE_FLEET if chosen.fake else FLEET, chosen.within):
            print("not all runs are there yet: the same command goes on")
            return 3
        calibrate(folder)
    return 0 if report(folder) else 1


if __name__ == "__main__":
    sys.exit(main())
