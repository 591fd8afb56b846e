"""An instance of Signalbox for as long as a measurement lasts: its own home, its own port, gone afterwards."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from load.units import LoadError


@dataclass(frozen=True, slots=True)
class Instance:
    base_url: str
    key: str
    environment: dict[str, str]

    def signalbox(self, *arguments: str) -> str:
        """What the command prints. LoadError with what it complained of."""
        return _signalbox(self.environment, *arguments)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def instance(fleet: str) -> Iterator[Instance]:
    """Serves that fleet file's text; has an API key."""
    with tempfile.TemporaryDirectory(prefix="signalbox-load-") as home:
        environment = {**os.environ, "SIGNALBOX_HOME": home}
        path = Path(home) / "fleet.yaml"
        path.write_text(fleet)
        port = free_port()
        try:
            _signalbox(environment, "up", str(path), "--detach", "--port", str(port))
            key = _signalbox(environment, "keys", "create", "load").splitlines()[-1]
            yield Instance(f"http://127.0.0.1:{port}", key, environment)
        finally:
            _signalbox(environment, "down", check=False)


def _signalbox(environment: dict[str, str], *arguments: str, check: bool = True) -> str:
    command = [sys.executable, "-m", "deploy.cli", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    if check and done.returncode:
        raise LoadError(f"`signalbox {' '.join(arguments)}` failed:\n{done.stderr.strip()}")
    return done.stdout
