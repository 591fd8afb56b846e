"""The process that owns a local instance: starts Ray and the fleet, answers `status`, stops everything.

    python -m deploy.supervisor LOCK_FD LEASH_FD < {"fleet": path or null, "host": ..., "port": ...}

`signalbox up` starts it in a session of its own, so that Ctrl-C reaches only the front. LOCK_FD holds the home. When
LEASH_FD (-1 for none) reads end of file, the front is gone, however it ended, and the instance stops too.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import select
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from deploy import app, instance, paths
from deploy.fleet import DEFAULT_FLEET, Fleet, load
from deploy.instance import Instance
from deploy.loopback import confine
from replicas.protocol import SignalboxError

log = logging.getLogger(__name__)

HEALTH_TIMEOUT_S = 60.0


class _Stop(BaseException):
    """Raised by a signal, wherever the main thread is: no step of the start has to poll for it."""


def main() -> int:
    lock_fd, leash_fd = int(sys.argv[1]), int(sys.argv[2])
    for descriptor in (lock_fd, leash_fd):
        if descriptor >= 0:
            os.set_inheritable(descriptor, False)
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return Supervisor(json.load(sys.stdin), leash_fd).run()


class Supervisor:
    def __init__(self, order: dict[str, Any], leash_fd: int) -> None:
        self._fleet_path = Path(order["fleet"]) if order["fleet"] else DEFAULT_FLEET
        self._leash_fd = leash_fd
        self._record = instance.write(
            Instance(
                pid=os.getpid(),
                host=order["host"],
                port=order["port"],
                fleet=str(order["fleet"] or "default"),
                log=str(instance.log_file()),
            )
        )
        self._stopping = False

    def run(self) -> int:
        """Serve until told to stop. 0 after a clean stop, 1 when the start failed."""
        self._catch_signals()
        failure = ""
        try:
            self._start(load(self._fleet_path))
            self._note("ready", "")
            self._wait()
        except (_Stop, SystemExit):  # while Ray starts, SIGTERM has Ray's handler, which exits
            pass
        except SignalboxError as error:
            failure = error.message
        except Exception as error:
            log.exception("start failed")
            failure = _reason(str(error).strip() or type(error).__name__)
        self._stopping = True
        try:
            self._stop(failure)
        finally:
            self._end(failure)
        return 1 if failure else 0

    def _catch_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._stopping:
            self._stopping = True
            raise _Stop

    def _note(self, state: str, detail: str) -> None:
        log.info("%s %s", state, detail)
        self._record = instance.update(self._record, state=state, detail=detail)

    # ---------------------------------------------------------------- up

    def _start(self, fleet: Fleet) -> None:
        self._record = instance.update(self._record, database=paths.database_url(fleet.gateway.database))
        run_dir = instance.run_dir()
        shutil.rmtree(run_dir, ignore_errors=True)
        run_dir.mkdir(mode=0o700)
        threading.Thread(target=self._watch_leash, daemon=True).start()
        self._note("starting", "Ray")
        os.environ.update(app.environment(fleet, run_dir, self._record.host))
        app.start(fleet, run_dir, port=self._record.port)
        self._catch_signals()  # Ray has put its own handlers in their place
        self._note("starting", "models and gateway")
        from ray import serve

        serve.run(
            app.application(fleet, database_url=self._record.database, state_dir=str(instance.home()), prepare=confine),
            name="signalbox",
            blocking=False,
        )
        self._note("starting", "first health check")
        self._await_health()
        threading.Thread(target=self._answer, daemon=True).start()

    def _await_health(self) -> None:
        deadline = time.monotonic() + HEALTH_TIMEOUT_S
        while True:
            try:
                with urllib.request.urlopen(f"{self._record.base_url}/health", timeout=5) as response:
                    if response.status == 200:
                        return
            except OSError as error:  # refused, timed out, or an HTTP error status
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"the endpoint is not healthy after {HEALTH_TIMEOUT_S:.0f} s: {error}"
                    ) from error
            time.sleep(0.05)

    def _wait(self) -> None:
        while True:
            signal.pause()

    def _watch_leash(self) -> None:
        if self._leash_fd >= 0:
            select.select([self._leash_fd], [], [])
            os.kill(os.getpid(), signal.SIGTERM)

    # ---------------------------------------------------------------- status

    def _answer(self) -> None:
        """A connection to the control socket gets one JSON document: the fleet as it is now."""
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(instance.control_socket()))
            listener.listen()
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    try:
                        answer = asyncio.run(_survey())
                    except Exception as error:
                        log.exception("no survey")
                        answer = {"error": str(error)}
                    connection.sendall(json.dumps(answer).encode())

    # ---------------------------------------------------------------- down

    def _stop(self, failure: str) -> None:
        self._note("stopping", failure)
        import ray

        if ray.is_initialized():
            from ray import serve

            with suppress(Exception):  # Ray itself may be what is broken; the sweep ends what is left
                if not failure:
                    serve.delete("signalbox")  # drains; a shutdown alone would cut the proxy off first
                serve.shutdown()
            ray.shutdown()

    def _end(self, failure: str) -> None:
        instance.sweep()
        shutil.rmtree(instance.run_dir(), ignore_errors=True)
        if failure:
            self._note("failed", failure)
        else:
            instance.forget()


def _reason(message: str) -> str:
    """What a person can act on: the error that a replica's constructor raised, where there is one."""
    import ray

    reasons: list[str] = []
    with suppress(Exception):  # Ray may be what failed
        if ray.is_initialized():
            from ray import serve

            for application in serve.status().applications.values():
                for deployment in application.deployments.values():
                    reasons += last_error(deployment.message)
    return "\n".join(dict.fromkeys(reasons)) or message.splitlines()[-1]


def last_error(traceback: str) -> list[str]:
    """The message of the last exception in a traceback's text; our own errors without their class."""
    found = re.findall(r"^(?:[\w.]+\.)?(\w+(?:Error|Exception|Fault|Unavailable)): (.+)$", traceback, re.MULTILINE)
    return [text if name == "ConfigError" else f"{name}: {text}" for name, text in found[-1:]]


async def _survey() -> dict[str, Any]:
    """Deployments as Serve sees them, replicas as they describe themselves."""
    import ray
    from ray import serve

    from replicas.client import ReplicaConnection
    from replicas.directory import DIRECTORY, directory_actor

    details = serve.status().applications.get("signalbox")
    deployments = (
        []
        if details is None
        else [
            {"name": name, "status": str(status.status.value), "message": status.message}
            for name, status in details.deployments.items()
        ]
    )
    view = await directory_actor(DIRECTORY).watch.remote("", 0.0)
    replicas = []
    for address in view.addresses:
        replica: dict[str, Any] = {"model": address.model, "id": address.replica_id, "endpoint": address.endpoint}
        try:
            connection = await ReplicaConnection.connect(address, gateway_id="status", timeout_s=2.0)
        except SignalboxError as error:
            replica |= {"state": "unreachable", "error": error.message}
        else:
            status = connection.status
            assert status is not None, "a replica describes itself with its status"
            replica |= {
                "state": status.state.value,
                "stats": _numbers(status.stats),
                "backends": connection.card.backends,
            }
            await connection.aclose()
        replicas.append(replica)
    return {"deployments": deployments, "replicas": replicas, "ray": ray.__version__}


def _numbers(stats: Any) -> dict[str, float]:
    return {name: getattr(stats, name) for name in type(stats).__slots__}


if __name__ == "__main__":
    sys.exit(main())
