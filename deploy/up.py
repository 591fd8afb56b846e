"""Starting, stopping and asking a local instance. The work is deploy.supervisor's, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from deploy import instance
from deploy.instance import Instance
from replicas.protocol import ConfigError

STOP_TIMEOUT_S = 90.0


class NotRunning(ConfigError):
    pass


@dataclass(slots=True)
class Launch:
    """A supervisor that was started. leash: writing end of a pipe whose closing stops it, -1 when detached."""

    process: subprocess.Popen[bytes]
    leash: int

    def record(self) -> Instance | None:
        """What the supervisor says of itself; None until it has said anything."""
        record = instance.read()
        return record if record is not None and record.pid == self.process.pid else None

    def steps(self) -> Iterator[str]:
        """What it is doing, until it is ready. Raises ConfigError with its reason when it gives up."""
        last = ""
        while True:
            ended = self.process.poll() is not None  # asked before the record is read: its last word counts
            record = self.record()
            if record is not None and record.state == "ready":
                return
            if ended:
                reason = record.detail if record is not None and record.state == "failed" else "the supervisor died"
                raise ConfigError(f"{reason}\nlog: {instance.log_file()}")
            if record is not None and record.detail != last:
                last = record.detail
                yield last
            time.sleep(0.02)

    def stop(self) -> None:
        """Let it finish what runs; interrupted meanwhile, end it at once."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait()
        except KeyboardInterrupt:
            self.process.kill()
            self.process.wait()
        instance.sweep()  # nothing is left unless it was killed or ended while Ray was starting
        instance.forget()


def launch(fleet: Path | None, *, host: str, port: int, detach: bool) -> Launch:
    """Start a supervisor for a fleet file that was found valid. ConfigError if this home or the port is taken."""
    lock = instance.lock()
    if lock is None:
        record = instance.read()
        where = f" at {record.base_url} (pid {record.pid})" if record else ""
        raise ConfigError(f"an instance is already running{where}; `signalbox down` stops it")
    try:
        _check_port(host, port)
        instance.sweep()  # of an instance whose supervisor was killed
        instance.forget()
        return _spawn(fleet, host, port, lock, detach)
    finally:
        os.close(lock)  # the supervisor has its own copy


def _spawn(fleet: Path | None, host: str, port: int, lock: int, detach: bool) -> Launch:
    log = instance.log_file()
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():
        log.replace(log.with_suffix(".log.1"))
    order = json.dumps({"fleet": str(fleet.resolve()) if fleet else None, "host": host, "port": port}).encode()
    leash_end, leash = (-1, -1) if detach else os.pipe()
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "deploy.supervisor", str(lock), str(leash_end)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=[descriptor for descriptor in (lock, leash_end) if descriptor >= 0],
                start_new_session=True,
            )
    finally:
        if leash_end >= 0:
            os.close(leash_end)
    assert process.stdin is not None, "asked for a pipe above"
    with process.stdin as stdin, suppress(BrokenPipeError):
        stdin.write(order)
    return Launch(process, leash)


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError as error:
            raise ConfigError(f"port {port} on {host} cannot be used: {error.strerror or error}") from error


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP become KeyboardInterrupt, as Ctrl-C does, so that one `finally` serves all three."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop() -> Instance:
    """Stop this home's instance and everything it started; NotRunning when there is none."""
    record = instance.running()
    if record is None:
        if left := instance.sweep():
            raise NotRunning(f"no instance is running; ended {len(left)} processes that a killed one had left")
        instance.forget()
        raise NotRunning("no instance is running")
    with suppress(ProcessLookupError):
        os.kill(record.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while instance.running() is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    if instance.running() is not None:
        with suppress(ProcessLookupError):
            os.kill(record.pid, signal.SIGKILL)
    instance.sweep()
    instance.forget()
    return record


def survey(timeout_s: float = 10.0) -> dict[str, Any]:
    """The running instance and its fleet as they are now; NotRunning when there is none."""
    record = instance.running()
    if record is None:
        raise NotRunning("no instance is running")
    found: dict[str, Any] = {
        "endpoint": f"{record.base_url}/v1",
        "state": record.state,
        "detail": record.detail,
        "fleet": record.fleet,
        "pid": record.pid,
        "log": record.log,
        "deployments": [],
        "replicas": [],
    }
    if record.state == "ready":
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(timeout_s)
            control.connect(str(instance.control_socket()))
            found |= json.loads(b"".join(iter(lambda: control.recv(65536), b"")))
    return found
