"""A real PostgreSQL server for checks and tests, as root or not: one per process (`shared`), a new database for each.

The server's programs come from PATH, from Debian's folders or from the wheel `pgserver`. PostgreSQL refuses to run as
root, so under root it runs as `nobody`, in a folder of its own directly under the temporary directory, because pytest's
folders are closed to others; programs that `nobody` may not read (a virtual environment in /root) are copied there.
It listens on a Unix socket only.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4


@dataclass(frozen=True)
class Postgres:
    folder: Path

    def url(self, database: str = "postgres") -> str:
        return f"postgresql+psycopg://signalbox@/{database}?host={self.folder}"

    def new_database(self) -> str:
        """The URL of an empty database."""
        import psycopg

        name = f"signalbox_{uuid4().hex}"
        with psycopg.connect(host=str(self.folder), user="signalbox", dbname="postgres", autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"'.encode())
        return self.url(name)


def candidates() -> Iterator[Path]:
    """Folders that may hold initdb and postgres, best first."""
    if (found := shutil.which("initdb")) and shutil.which("postgres"):
        yield Path(found).resolve().parent
    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    wheel = importlib.util.find_spec("pgserver")
    if wheel is not None and wheel.origin is not None:
        yield Path(wheel.origin).parent / "pginstall" / "bin"


def programs() -> Path:
    for folder in candidates():
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    raise RuntimeError("no PostgreSQL server found: install Debian's `postgresql` or the wheel `pgserver`")


def _identity() -> dict[str, Any]:
    """For subprocess: whom the server runs as."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _runnable(folder: Path, home: Path, identity: dict[str, Any]) -> Path:
    """The folder itself, or a copy of the installation where its user may not run what is in there."""
    try:
        check = subprocess.run(
            [folder / "postgres", "--version"], **identity, capture_output=True, cwd=home, check=False
        )
        if check.returncode == 0:
            return folder
    except PermissionError:
        pass
    # the wheel's programs find their libraries in a folder beside the package, so both are copied as they lie
    package = folder.parent.parent
    beside = package.with_name(f"{package.name}.libs")
    copied = [package, beside] if beside.exists() else [folder.parent]
    for source in copied:
        shutil.copytree(source, home / source.name, symlinks=True)
        for path in (home / source.name, *(home / source.name).rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755)
    return home / folder.relative_to(copied[0].parent)


@contextmanager
def running_postgres(folder: Path | None = None) -> Iterator[Postgres]:
    """`folder` of initdb and postgres, found by itself if not given."""
    identity = _identity()
    home = Path(tempfile.mkdtemp(prefix="signalbox-pg-", dir="/tmp"))
    try:
        home.chmod(0o755)
        data = home / "data"
        data.mkdir()
        if identity:
            os.chown(home, identity["user"], identity["group"])
            os.chown(data, identity["user"], identity["group"])
        binaries = _runnable(folder or programs(), home, identity)
        environment = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "HOME": str(home)}
        initdb: list[str | Path] = [
            binaries / "initdb",
            "-D",
            data,
            "-U",
            "signalbox",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--no-sync",
        ]
        made = subprocess.run(
            initdb, **identity, env=environment, cwd=home, check=False, capture_output=True, text=True
        )
        if made.returncode != 0:
            raise RuntimeError(f"initdb failed:\n{made.stderr}")
        options = ("listen_addresses=", f"unix_socket_directories={home}", "fsync=off", "max_connections=200")
        command: list[str | Path] = [
            binaries / "postgres",
            "-D",
            data,
            *(part for option in options for part in ("-c", option)),
        ]
        with (home / "log").open("wb") as log:
            server = subprocess.Popen(command, **identity, env=environment, cwd=home, stdout=log, stderr=log)
        try:
            _wait(server, home)
            yield Postgres(home)
        finally:
            server.terminate()  # waits for no client's transaction, unlike an interrupt
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait(10)
    finally:
        shutil.rmtree(home, ignore_errors=True)


@cache
def shared() -> Postgres:
    """Started by the first who asks, stopped at the end of the process."""
    stack = ExitStack()
    server = stack.enter_context(running_postgres())
    atexit.register(stack.close)
    return server


def _wait(server: subprocess.Popen[bytes], home: Path) -> None:
    import psycopg

    deadline = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(host=str(home), user="signalbox", dbname="postgres").close()
            return
        except psycopg.OperationalError as error:
            log = (home / "log").read_text(errors="replace")
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start:\n{log}") from error
            time.sleep(0.02)
