"""Our C++ kernels for CPUs, float32 only: built once per machine, called through ctypes on raw pointers.

`library()` gives the kernels or None, and `why_not()` the reason; everything above falls back to torch then.

    kernels.h        what the sources offer to Python and to one another
    simd.h           vectors of the target's widest size, exp2
    team.h           how many threads to use while other processes want the cores too, and who does what
    gemm.h, gemm.cpp linear layers on packed weights, and the register tile that attention shares
    codes.h          quantised weights: products with few rows, slices of numbers for many
    attention.cpp    paged attention over a mixed batch; key_block.h is what it does with 64 keys
    stack.cpp        all layers of a decoder in one call
    chain.cpp        all guesses of a draft on the target's states in one call
    elementwise.cpp  RMSNorm (with residual), RoPE, SiLU * up
    compiler.py      flags, cache
    linear.py        weights as the kernels want them
    ops.py, paged.py, stack.py, chain.py: the Ops, Attention, Stack and Chain of the engine, on top of these

Environment: SIGNALBOX_NATIVE=0 switches them off, CXX names the compiler, SIGNALBOX_CACHE (or XDG_CACHE_HOME) says
where the built library is kept. `python -m replicas.engine.native` builds ahead of first use.
"""

from __future__ import annotations

import logging
import os
import threading

from replicas.engine.native.compiler import BuildError, build
from replicas.engine.native.library import Library

logger = logging.getLogger(__name__)

_lock = threading.Lock()
_loaded: Library | None = None
_reason: str | None = None


def library() -> Library | None:
    """The kernels of this machine, built on the first call of a process if the cache lacks them. Thread-safe.

    A failure is logged once and remembered; SIGNALBOX_NATIVE=0 is looked at on every call.
    """
    global _loaded, _reason
    if _switched_off():
        return None
    with _lock:
        if _loaded is None and _reason is None:
            try:
                _loaded = Library(build())
            except (BuildError, OSError) as error:
                _reason = str(error)
                logger.warning("native kernels are not available, torch takes over: %s", _reason)
        return _loaded


def why_not() -> str:
    """Why `library()` gave None; "" if it did not."""
    return "SIGNALBOX_NATIVE=0 is set" if _switched_off() else _reason or ""


def _switched_off() -> bool:
    return os.environ.get("SIGNALBOX_NATIVE", "1") == "0"
