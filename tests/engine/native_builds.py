"""The kernels as they come out for several instruction sets: what the widest machine runs and what narrower ones do."""

from __future__ import annotations

import functools
import platform
import shutil
from pathlib import Path

import pytest

from replicas.engine.native.compiler import build
from replicas.engine.native.library import Library


def _marches() -> list[str]:
    """This machine's own set, AVX2 without AVX-512 where it can run, and plain SSE2."""
    if platform.machine() != "x86_64":
        return ["native"]
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return ["native", *(["haswell"] if "avx2" in flags and "fma" in flags else []), "x86-64"]


MARCHES = _marches()
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine")


@functools.cache
def kernels(march: str) -> Library:
    return Library(build(march))
