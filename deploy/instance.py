"""The record of the running instance of one home: what `up` leaves for `status`, `down` and `chat`.

One home (SIGNALBOX_HOME) runs at most one instance, held by a file lock that dies with its supervisor. Everything that
an instance starts carries its marker in the environment, so that nothing is ever stopped that it did not start.
Standard library only; Linux's /proc where processes are looked up.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deploy import paths

MARKER = "SIGNALBOX_INSTANCE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """state: "starting", "ready", "stopping" or "failed" (then `detail` has the reason; while starting, the step).

    database: the URL, which may hold a password: the record is for its owner's eyes.
    """

    pid: int
    host: str
    port: int
    fleet: str
    log: str
    database: str = ""
    state: str = "starting"
    detail: str = ""

    @property
    def base_url(self) -> str:
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def api_key(self) -> str | None:
        """The key that the first `up` made for this machine's owner, while its file is kept."""
        with suppress(OSError):
            return first_key_file().read_text().strip() or None
        return None


def home() -> Path:
    return paths.state_dir()


def first_key_file() -> Path:
    return home() / "first-key"


def log_file() -> Path:
    return home() / "logs" / "signalbox.log"


def identity() -> str:
    """Short name of this home, the same in every process."""
    return hashlib.sha256(str(home().resolve()).encode()).hexdigest()[:8]


def run_dir() -> Path:
    """Sockets and scratch files of the instance. Short on purpose: a Unix socket's path has at most 107 bytes."""
    return Path(tempfile.gettempdir()) / f"signalbox-{os.getuid()}-{identity()}"


def control_socket() -> Path:
    return run_dir() / "control"


def read() -> Instance | None:
    """The last record, or None. Only `running` tells whether it is still true."""
    try:
        return Instance(**json.loads((home() / "instance.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write(instance: Instance) -> Instance:
    """Atomically, so that a reader never sees half of it."""
    home().mkdir(parents=True, exist_ok=True)
    draft = home() / f"instance.json.{os.getpid()}"
    draft.touch(mode=0o600)
    draft.write_text(json.dumps(asdict(instance)))
    draft.replace(home() / "instance.json")
    return instance


def update(instance: Instance, **changes: Any) -> Instance:
    return write(replace(instance, **changes))


def forget() -> None:
    """Remove the record and the scratch files of an instance that has ended."""
    shutil.rmtree(run_dir(), ignore_errors=True)
    (home() / "instance.json").unlink(missing_ok=True)


def lock() -> int | None:
    """A descriptor that holds the home, or None if an instance has it. Closing its last copy lets go."""
    home().mkdir(parents=True, exist_ok=True)
    descriptor = os.open(home() / "instance.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def running() -> Instance | None:
    """The live instance of this home."""
    descriptor = lock()
    if descriptor is None:
        return read()
    os.close(descriptor)
    return None


@contextmanager
def held() -> Iterator[int | None]:
    """`lock` for the length of a block."""
    descriptor = lock()
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def processes() -> list[int]:
    """Pids of what this home's instance started, this process not among them."""
    wanted = f"{MARKER}={identity()}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):  # gone meanwhile, or another user's
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def sweep(grace_s: float = 5.0) -> list[int]:
    """End what is left of the instance: SIGTERM, after `grace_s` SIGKILL. Returns the pids that were there."""
    left = found = processes()
    for number, patience in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + patience
        while (left := processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        if not left:
            break
    return found
