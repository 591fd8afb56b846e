"""Somebody else's program for as long as it is needed: in a session of its own, its words in a file, then gone."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_PATIENCE_S = 15.0
_PAUSE_S = 0.1
_BEHIND = 19  # the most there is
# In front of a command: on cores that a server keeps busy, the load generator beside it has precedence. Without it a
# late generator would be taken for a slow server. See `step_behind`, too.
BEHIND = ("nice", "-n", str(_BEHIND))
_MARK = "SIGNALBOX_LOAD_SERVER"
QUIET_CORES = 0.2  # beyond that, what others compute makes ratios mean little


class Child:
    """Started by its constructor. `stop` ends it and whatever it has started, in its process group or out of it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def ended(self, within_s: float = 0.0) -> int | None:
        """Its exit status as soon as it has one; None if it still runs after `within_s`."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(within_s)
        return None

    def last_words(self, lines: int = 12) -> list[str]:
        return last_lines(self.log, lines)

    def stop(self, patience_s: float = _PATIENCE_S) -> None:
        """Asks (SIGTERM), waits, then kills what is left of its session."""
        try:
            if self._process.poll() is None:
                self._process.terminate()
                self.ended(patience_s)
        finally:
            self._kill_session()
            self._process.wait()

    def _kill_session(self) -> None:
        """Until nobody is left: who is being killed may still have started another."""
        deadline = time.monotonic() + _PATIENCE_S
        while (left := session(self.pid)) and time.monotonic() < deadline:
            for pid in left:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            self._process.poll()  # its own remains are for us to take away
            time.sleep(_PAUSE_S)


def session(leader: int) -> list[int]:
    """The living processes of a session (proc_pid_stat(5), field 6).

    Where there is no /proc the leader's process group is killed and nobody said to be left.
    """
    if not Path("/proc/self/stat").exists():
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)
        return []
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                state, _, _, number = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(number) == leader and state not in "ZX":
                    found.append(int(entry.name))
    return found


@contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[Child]:
    child = Child(command, environment, log)
    try:
        yield child
    finally:
        child.stop()


@contextmanager
def marked(mark: str) -> Iterator[None]:
    """What is started meanwhile, and whatever that starts later, is known to `step_behind` by `mark`."""
    os.environ[_MARK] = mark
    try:
        yield
    finally:
        del os.environ[_MARK]


def step_behind(mark: str) -> None:
    """Give precedence over the marked processes to all others.

    Linux may share a core out among sessions first and heed niceness only within one (autogroup, sched(7)), so the
    sessions are told too. Where that cannot be told, nothing happens.
    """
    wanted = f"{_MARK}={mark}".encode()
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        with suppress(OSError):
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                (entry / "autogroup").write_text(str(_BEHIND))


def cores_in_use(seconds: float = 1.0) -> float | None:
    """How many cores the whole machine uses on average in the next `seconds`; None where /proc/stat does not tell."""
    before = _core_seconds()
    if before is None:
        return None
    time.sleep(seconds)
    after = _core_seconds()
    assert after is not None, "it was there a moment ago"
    return (after - before) / seconds


def cores_kept(seconds: float = 10.0) -> float | None:
    """`cores_in_use` as soon as it is at most QUIET_CORES, or after so many seconds what it then is: what has just been
    stopped may take a moment to go."""
    deadline = time.monotonic() + seconds
    while (used := cores_in_use()) is not None and used > QUIET_CORES and time.monotonic() < deadline:
        pass
    return used


def _core_seconds() -> float | None:
    """User, nice, system, interrupts and stolen time of all cores since boot (proc_stat(5))."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = (int(one) for one in stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def last_lines(log: Path, lines: int) -> list[str]:
    """The last lines that say something; of one that a progress bar has overwritten, the last state."""
    if not log.exists():
        return []
    text = log.read_bytes()[-65536:].decode("utf-8", "replace")
    said = (line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n"))
    return [line for line in said if line][-lines:]
