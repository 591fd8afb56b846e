"""The comparison itself: environments first, then one server after the other, each under the same tasks.

    for document in Comparison(contestants, setting, console).run(): …

A server that cannot be installed, started or loaded is written down with its reason and its last words, and the next
one has its turn. The document is whole after every server: what has been measured survives whatever comes later.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from load import environments, results
from load.campaign import FAILED, INTERRUPTED, LATE, WELL
from load.environments import CannotInstall
from load.execute import execute
from load.peers.contestants import CONTESTANTS, Contestant, Stage
from load.peers.serving import PeerFailed, Served, first_token
from load.peers.workloads import GATEWAY, KINDS, tasks, warm_up
from load.processes import cores_kept, marked, step_behind
from load.scripted import mock_upstream
from load.show import progress
from load.summary import Judging, summarise
from load.units import LoadError

Json = dict[str, Any]
SCHEMA = "signalbox.peers/1"


@dataclass(frozen=True, slots=True)
class Setting:
    """model: folder or GGUF that the model servers serve. seconds: of each task. root: where environments are made."""

    model: Path
    seconds: float
    root: Path = environments.ROOT


@dataclass
class Comparison:
    """`contestants` have their turns in this order; `servers` are what an earlier run has measured already."""

    contestants: Sequence[Contestant]
    setting: Setting
    console: Console
    servers: list[Json] = field(default_factory=list)
    interrupted: bool = False

    def go_on_from(self, path: Path) -> None:
        """Whom that file's run has measured is not measured again. LoadError where the two would not compare."""
        earlier, now = results.read_json(path), self.document()
        if earlier.get("schema") != SCHEMA:
            raise LoadError(f"{path} is not a result of `signalbox load peers` (schema {earlier.get('schema')!r})")
        for name in ("machine", "settings"):
            if earlier.get(name) != now[name]:
                raise LoadError(f"{path}: {name} differs: {earlier.get(name)} there, {now[name]} here")
        self.servers += [server for server in earlier["servers"] if not server["failure"]]
        known = {server["name"] for server in self.servers}
        self.contestants = [one for one in self.contestants if one.name not in known]

    def run(self) -> Iterator[Json]:
        """The document after every server. Ctrl-C ends it early and is no exception."""
        try:
            pythons = self.install()
            for kind in KINDS:
                ready = [one for one in self.contestants if one.kind == kind and one.name in pythons]
                with ExitStack() as stack:
                    upstream = stack.enter_context(mock_upstream()) if ready and kind == GATEWAY else ""
                    for contestant in ready:
                        self._measure(contestant, pythons[contestant.name], upstream)
                        yield self.document()
        except KeyboardInterrupt:
            self.interrupted = True
        yield self.document()

    def install(self) -> dict[str, Path]:
        """The interpreters of those that can run; the others' failures are written down."""
        pythons = {}
        for one in self.contestants:
            try:
                pythons[one.name] = (
                    environments.interpreter(one.environment, self.setting.root, self._say)
                    if one.environment
                    else Path(sys.executable)
                )
            except (CannotInstall, OSError) as error:
                self._fail(self._enter(one), "install", error)
        return pythons

    def _enter(self, contestant: Contestant) -> Json:
        entry = {name: getattr(contestant, name) for name in ("name", "kind", "role", "weights", "note")} | {
            "versions": {},
            "others_cores": None,
            "first_token_s": None,
            "failure": None,
            "runs": [],
        }
        self.servers.append(entry)
        return entry

    def _measure(self, contestant: Contestant, python: Path, upstream: str) -> None:
        entry = self._enter(contestant)
        # Ray's sockets lie in it, and a socket's path may have 107 letters
        with tempfile.TemporaryDirectory(prefix="peer-", dir="/tmp" if os.path.isdir("/tmp") else None) as scratch:
            stage = Stage(python, self.setting.model, Path(scratch), upstream)
            step = "start"
            try:
                entry["versions"] = environments.versions(python, contestant.packages)
                entry["others_cores"] = cores_kept()  # nothing of ours computes now
                self._say(f"{contestant.name}: starting")
                with ExitStack() as running:
                    mark = secrets.token_hex(8)
                    with marked(mark):
                        served = running.enter_context(contestant.serve(stage))
                    entry["first_token_s"] = first_token(served, contestant.limit_s)
                    step = "load"
                    self._load(contestant, served, entry, mark)
            except (LoadError, OSError, subprocess.SubprocessError) as error:
                self._fail(entry, step, error)
            except KeyboardInterrupt:
                self._fail(entry, step, PeerFailed("interrupted"))
                raise

    def _load(self, contestant: Contestant, served: Served, entry: Json, mark: str) -> None:
        self._say(f"{contestant.name}: first token after {entry['first_token_s']:.1f} s")
        for task in (warm_up(), *tasks(contestant.kind, self.setting.seconds)):
            plan = task.plan(served.target())
            step_behind(mark)
            with progress(self.console, plan, f"{contestant.name}, {task.name}") as update:
                collected = execute(plan, update)
            run = summarise(plan, collected, Judging(), task.name)
            run["requests"] = {}  # thousands of rows of nine servers would be a large file
            run["asked_output"] = task.output
            if task.counts:
                entry["runs"].append(run)
            if run["interrupted"]:
                raise KeyboardInterrupt
            _check(run, served)

    def _fail(self, entry: Json, step: str, error: Exception) -> None:
        reason = getattr(error, "reason", None) or str(error)
        entry["failure"] = {"step": step, "reason": reason, "log": getattr(error, "log", [])}
        self._say(f"{entry['name']}: FAILED to {step}: {reason.splitlines()[0]}")

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def document(self) -> Json:
        found = results.document("peers", {"seconds": self.setting.seconds, "model": self.setting.model.name}, [])
        del found["runs"]
        order = {name: number for number, name in enumerate(CONTESTANTS)}
        servers = sorted(self.servers, key=lambda server: order.get(server["name"], len(order)))
        return found | {"schema": SCHEMA, "interrupted": self.interrupted, "servers": servers}


def _check(run: Json, served: Served) -> None:
    """Raises PeerFailed where the server did not live, or did not answer everything."""
    status = served.child.ended() if served.child else None
    last_words = served.child.last_words() if served.child else []
    if status is not None:
        raise PeerFailed(f"ended with exit status {status} under load ({run['label']})", last_words)
    counts = run["counts"]["all"]
    if counts["completed"] < counts["sent"] or not counts["sent"]:
        why = run["failures"][0]["detail"] if run["failures"] else run["stopped"]
        bad = counts["sent"] - counts["completed"]
        raise PeerFailed(f"{bad} of {counts['sent']} requests failed ({run['label']}): {why}", last_words)


def verdict(document: Json) -> int:
    """The exit status, as load.campaign has it: interrupted, then failures, then a generator that was late."""
    servers = document["servers"]
    if document["interrupted"]:
        return INTERRUPTED
    if any(server["failure"] for server in servers):
        return FAILED
    late = any(not run["generator"]["kept_up"] for server in servers for run in server["runs"])
    return LATE if late else WELL
