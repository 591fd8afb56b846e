"""The null server as a child process, for the commands that measure generators against it."""

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
    process = subprocess.Popen(
        [sys.executable, "-m", "load.null_server", *options], stdout=subprocess.PIPE, text=True, env=os.environ.copy()
    )
    try:
        assert process.stdout is not None, "opened with a pipe"
        line = process.stdout.readline()
        if not line.startswith("null server on "):
            raise LoadError(f"the null server did not start: {line.strip() or process.wait()}")
        if core is not None:
            pin(core, process.pid)
        yield line.removeprefix("null server on ").strip()
    finally:
        process.terminate()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()


def pin(core: int, process: int = 0) -> None:
    """Keep a process (0: this one, and what it starts later) on one core, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process, {core})
