"""The engine room. Needs torch, numpy, safetensors (and tokenizers or gguf for what it loads); nothing else.

The names below load on first use: the scheduler, the block pool and the sequence are of use without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from replicas.engine.config import EngineConfig
    from replicas.engine.engine import Engine
    from replicas.engine.offline import Completion, Output
    from replicas.protocol import SamplingParams

__all__ = ["Completion", "Engine", "EngineConfig", "Output", "SamplingParams"]

_HOMES = {
    "Completion": "replicas.engine.offline",
    "Engine": "replicas.engine.engine",
    "EngineConfig": "replicas.engine.config",
    "Output": "replicas.engine.offline",
    "SamplingParams": "replicas.protocol",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
