"""Servers whose answers are known, as child processes: for whatever measures generators and gateways against them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from load.units import LoadError


@contextmanager
def null_server(*options: str, core: int | None = None) -> Iterator[str]:
    """The base URL of a null server with these options that lives as long as the block; on one core if asked."""
    with _announced("load.null_server", "null server", options) as (url, pid):
        if core is not None:
            pin(core, pid)
        yield url


@contextmanager
def mock_upstream(*options: str) -> Iterator[str]:
    """The same of `replicas.mock_upstream`, which misbehaves on request; its URL ends in /v1."""
    with _announced("replicas.mock_upstream", "mock upstream", options) as (url, _):
        yield url


@contextmanager
def _announced(module: str, name: str, options: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """URL and process of a module that says `NAME on URL` when it serves."""
    process = subprocess.Popen([sys.executable, "-m", module, *options], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None, "opened with a pipe"
        line = process.stdout.readline()
        if not line.startswith(f"{name} on "):
            raise LoadError(f"the {name} did not start: {line.strip() or process.wait()}")
        yield line.removeprefix(f"{name} on ").strip(), process.pid
    finally:
        process.terminate()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()


def pin(core: int, process: int = 0) -> None:
    """Keep a process (0: this one, and what it starts later) on one core, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process, {core})
