"""`signalbox up` as a user runs it: real processes, a fleet without weights."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy import instance
from deploy.app import free_port

FLEET = """
models:
  - name: fake
    engine: fake
    num_cpus: 0.5
    drain_s: 10
    engine_settings: {tokens_per_s: 20}
"""
BODY = {"model": "fake", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}


@dataclass
class Home:
    """A home of its own, with the commands run in it."""

    path: Path
    port: int

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, "SIGNALBOX_HOME": str(self.path)}

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "deploy.cli", *arguments]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), env=self.env, capture_output=True, text=True, timeout=200, check=False
        )

    @property
    def fleet(self) -> str:
        file = self.path / "fleet.yaml"
        file.write_text(FLEET)
        return str(file)

    def client(self) -> httpx.Client:
        key = (self.path / "first-key").read_text().strip()
        return httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}/v1", headers={"authorization": f"Bearer {key}"}, timeout=30
        )

    def processes(self) -> list[int]:
        """What the instance started, this process and its kind left out."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SIGNALBOX_HOME", str(self.path))
            return instance.processes()


def make_home(factory: pytest.TempPathFactory) -> Home:
    return Home(factory.mktemp("home"), free_port())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    home = make_home(tmp_path_factory)
    up = home.run("up", home.fleet, "--detach", "--port", str(home.port))
    assert up.returncode == 0, up.stderr
    assert f"http://127.0.0.1:{home.port}/v1" in up.stdout
    assert (home.path / "first-key").stat().st_mode & 0o077 == 0
    yield home
    down = home.run("down")
    assert down.returncode == 0, down.stderr
    assert home.processes() == []
    assert "no instance is running" in home.run("down").stderr
    with socket.socket() as sock:
        assert sock.connect_ex(("127.0.0.1", home.port)) != 0


def replica_pid(home: Home) -> int:
    """The process that listens where the replica says it does."""
    [replica] = [r for r in json.loads(home.run("status", "--json").stdout)["replicas"] if r["state"] == "ready"]
    port = int(replica["endpoint"].rsplit(":", 1)[1])
    [pid] = [pid for pid, address, at in listeners(home.processes()) if at == port]
    return pid


def listeners(pids: list[int]) -> list[tuple[int, str, int]]:
    """(pid, address, port) of every TCP socket on which one of the processes listens."""
    by_inode: dict[str, tuple[str, int]] = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            columns = line.split()
            address, port = columns[1].split(":")
            if columns[3] == "0A":
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                by_inode[columns[9]] = (str(ip_address(b"".join(words))), int(port, 16))
    found = []
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inode = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link))
            except OSError:
                continue
            if inode and inode[1] in by_inode:
                found.append((pid, *by_inode[inode[1]]))
    return found


@pytest.mark.slow
def test_it_answers_and_tells_its_state(home: Home) -> None:
    with home.client() as client:
        answer = client.post("/chat/completions", json=BODY)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 5
    found = json.loads(home.run("status", "--json").stdout)
    [replica] = found["replicas"]
    assert (found["state"], replica["model"], replica["state"]) == ("ready", "fake", "ready")
    assert replica["stats"]["generation_tokens"] == 5
    assert replica["stats"]["kv_blocks_free"] == replica["stats"]["kv_blocks_total"]


@pytest.mark.slow
def test_nothing_listens_beyond_loopback(home: Home) -> None:
    found = listeners(home.processes())
    assert ("127.0.0.1", home.port) in {(address, port) for _, address, port in found}
    outside = {a for _, a, _ in found if not (ip_address(a).is_loopback or a.startswith("::ffff:7f00:"))}
    assert not outside


@pytest.mark.slow
def test_a_second_up_says_what_is_in_its_way(home: Home, tmp_path: Path) -> None:
    again = home.run("up", home.fleet, "--detach", "--port", str(free_port()))
    assert again.returncode == 1
    assert "already running" in again.stderr
    other = Home(tmp_path, home.port).run("up", home.fleet, "--detach", "--port", str(home.port))
    assert other.returncode == 1
    assert f"port {home.port}" in other.stderr


@pytest.mark.slow
def test_kill_9_of_the_replica_ends_the_stream_and_the_next_request_works(home: Home) -> None:
    pid = replica_pid(home)
    with home.client() as client:
        asked: dict[str, Any] = {**BODY, "stream": True, "max_tokens": 400}
        lines: list[str] = []
        killed = 0.0
        cut = False
        with client.stream("POST", "/chat/completions", json=asked) as response:
            try:
                for line in response.iter_lines():
                    if not lines:
                        os.kill(pid, signal.SIGKILL)
                        killed = time.monotonic()
                    lines.append(line)
            except httpx.RemoteProtocolError:
                cut = True
        assert cut, "a stream that broke must not end as a whole one does"
        assert time.monotonic() - killed < 2
        assert any('"error"' in line for line in lines)
        assert not any("[DONE]" in line for line in lines)
        assert client.post("/chat/completions", json=BODY).status_code == 200


@pytest.mark.slow
def test_a_directory_that_dies_is_filled_again_and_nobody_notices(home: Home) -> None:
    def directories() -> list[int]:
        return [pid for pid in home.processes() if b"DirectoryService" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def replicas() -> list[str]:
        return [replica["state"] for replica in json.loads(home.run("status", "--json").stdout).get("replicas", [])]

    [pid] = directories()
    os.kill(pid, signal.SIGKILL)
    with home.client() as client:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            assert client.post("/chat/completions", json=BODY).status_code == 200
            if "ready" in replicas():
                break
    assert "ready" in replicas()
    assert directories() != [pid]


@pytest.mark.slow
def test_ctrl_c_finishes_what_runs_and_stops_everything_that_up_started(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    home = make_home(tmp_path_factory)
    # a shell that runs the tests in the background ignores SIGINT, and so would all its children
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        home.command("up", home.fleet, "--port", str(home.port)), env=home.env, stdout=subprocess.PIPE, text=True
    ) as up:
        assert up.stdout is not None
        for line in up.stdout:
            if "Ctrl-C" in line:
                break
        assert len(home.processes()) > 3
        with home.client() as client:
            asked: dict[str, Any] = {**BODY, "stream": True, "max_tokens": 40}
            with client.stream("POST", "/chat/completions", json=asked) as response:
                lines = response.iter_lines()
                assert next(lines)
                up.send_signal(signal.SIGINT)
                assert "data: [DONE]" in list(lines)
        assert up.wait(60) == 0
    assert home.processes() == []
    assert not (home.path / "instance.json").exists()


@pytest.mark.slow
def test_a_killed_front_takes_the_instance_with_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    """kill -9 of `signalbox up` while it starts: nobody is left to stop what it has begun."""
    home = make_home(tmp_path_factory)
    with subprocess.Popen(home.command("up", home.fleet, "--port", str(home.port)), env=home.env) as up:
        deadline = time.monotonic() + 60
        while len(home.processes()) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        up.kill()
    deadline = time.monotonic() + 60
    while home.processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert home.processes() == []


def test_up_refuses_a_bad_fleet_before_anything_starts(tmp_path: Path) -> None:
    home = Home(tmp_path, free_port())
    (tmp_path / "bad.yaml").write_text("models:\n  - name: a\n    engin: fake\n")
    done = home.run("up", str(tmp_path / "bad.yaml"))
    assert done.returncode == 1
    assert "did you mean 'engine'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "logs").exists()


def test_status_and_down_without_an_instance_say_so(tmp_path: Path) -> None:
    home = Home(tmp_path, 0)
    for command in ("status", "down"):
        done = home.run(command)
        assert (done.returncode, done.stderr) == (1, "signalbox: no instance is running\n")


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['signalbox', '--help']; from deploy.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([m for m in ('ray', 'torch', 'fastapi', 'pydantic', 'zmq', 'sqlalchemy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_reason_is_the_last_error_of_a_traceback() -> None:
    from deploy.supervisor import last_error

    text = "Traceback:\n  File x\nValueError: first\n\nThe above:\n\nreplicas.protocol.ConfigError: no such thing: y\n"
    assert last_error(text) == ["no such thing: y"]
    assert last_error("all is well") == []
