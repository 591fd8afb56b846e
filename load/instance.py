"""An instance of a check's own: started by the `signalbox` command in a home of its own, and taken down at the end.

Its gateways and replicas can be killed: they are found by the home in their environment, so nothing else ever is.
"""

from __future__ import annotations

import os
import signal
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from load.own_instance import free_port, signalbox
from load.units import LoadError

_GATEWAY, _REPLICA = "ray::ServeReplica:signalbox:Gateway", "ray::ServeReplica:signalbox:model-"


class Instance:
    """Up between `with` and its end. Blocking. fleet: a fleet file's text. database: a URL, or in the home."""

    def __init__(self, fleet: str, database: str = "") -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="signalbox-check-")
        self.home = Path(self._folder.name)
        self.database = database or f"sqlite:///{self.home}/signalbox.db"
        self.fleet = fleet
        self.base_url = f"http://127.0.0.1:{free_port()}"
        self._environment = {**os.environ, "SIGNALBOX_HOME": str(self.home), "DATABASE_URL": self.database}

    def __enter__(self) -> Instance:
        file = self.home / "fleet.yaml"
        file.write_text(self.fleet)
        try:
            self.command("up", str(file), "--detach", "--port", self.base_url.rpartition(":")[2])
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(LoadError):  # it may not have come up
            self.command("down")
        self._folder.cleanup()

    def command(self, *arguments: str) -> str:
        """What a `signalbox` command prints; LoadError with its last words where it fails."""
        return signalbox(self._environment, *arguments)

    def key(self, name: str) -> str:
        return self.command("keys", "create", name).split()[-1]

    def admin_token(self) -> str:
        return self.command("admin-token", "create", "check").split()[-1]

    # ---------------------------------------------------------------- what can be killed

    def gateways(self) -> list[int]:
        return self._processes(_GATEWAY)

    def replicas(self) -> list[int]:
        return self._processes(_REPLICA)

    def _processes(self, title: str) -> list[int]:
        mark, found = f"SIGNALBOX_HOME={self.home}".encode(), []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if (
                    entry.name.isdigit()
                    and (entry / "cmdline").read_bytes().startswith(title.encode())
                    and mark in (entry / "environ").read_bytes().split(b"\0")
                ):
                    found.append(int(entry.name))
        return sorted(found)

    def journal(self, replica: int) -> Path | None:
        """The journal that a replica's process has open."""
        for link in Path(f"/proc/{replica}/fd").iterdir():
            with suppress(OSError):
                target = Path(os.readlink(link))
                if target.parent == self.home / "journals":
                    return target
        return None


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
