"""An instance of Signalbox for as long as a measurement lasts: its own home, its own port, gone afterwards."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from load.processes import BEHIND
from load.units import LoadError

_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Instance:
    """keys: by name, in the order asked for. up_s: what `signalbox up` took, from its start to its return."""

    base_url: str
    keys: Mapping[str, str]
    environment: Mapping[str, str]
    up_s: float

    @property
    def key(self) -> str:
        return next(iter(self.keys.values()))

    def signalbox(self, *arguments: str) -> str:
        """What the command prints. LoadError with what it complained of."""
        return signalbox(self.environment, *arguments)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def instance(fleet: str, *names: str, behind: bool = False) -> Iterator[Instance]:
    """Serves that fleet file's text; has an API key of each name, one where none is given. behind: see `BEHIND`."""
    with tempfile.TemporaryDirectory(prefix="signalbox-load-") as home:
        environment = {**os.environ, "SIGNALBOX_HOME": home}
        path = Path(home) / "fleet.yaml"
        path.write_text(fleet)
        port = free_port()
        try:
            began = time.monotonic()
            signalbox(environment, "up", str(path), "--detach", "--port", str(port), behind=behind)
            up_s = time.monotonic() - began
            keys = {name: signalbox(environment, "keys", "create", name).split()[-1] for name in names or ("load",)}
            yield Instance(f"http://127.0.0.1:{port}", keys, environment, up_s)
        finally:
            signalbox(environment, "down", check=False)


def signalbox(environment: Mapping[str, str], *arguments: str, check: bool = True, behind: bool = False) -> str:
    """What a `signalbox` command prints; LoadError with its last words where it fails."""
    command = [*(BEHIND if behind else ()), sys.executable, "-m", "deploy.cli", *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise LoadError(f"signalbox {arguments[0]} took more than {_TIMEOUT_S:g} s") from None
    if check and done.returncode:
        raise LoadError(f"`signalbox {' '.join(arguments)}` failed:\n{(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout
