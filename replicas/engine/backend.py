"""One rule for choosing among kernels that may or may not be usable here: every name says why not, or is taken."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from replicas.engine import native
from replicas.protocol import ConfigError

logger = logging.getLogger(__name__)

NOT_BUILT_YET = "not built yet"


def native_obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Why the C++ kernels cannot serve this device and type; "" if they can. Builds them on the first call."""
    if device.type != "cpu":
        return f"runs on cpu, not on {device.type}"
    if dtype is not torch.float32:
        return f"computes in float32, not in {str(dtype).removeprefix('torch.')}"
    return "" if native.library() is not None else native.why_not()


def pick(kind: str, name: str, obstacles: Mapping[str, str]) -> str:
    """The name to use out of `obstacles` (best first, each with why it cannot be used or "").

    "auto" takes the first without an obstacle and logs what it passed over. A name that cannot be had raises
    ConfigError with the reason and the names that can.
    """
    usable = [candidate for candidate, obstacle in obstacles.items() if not obstacle]
    if name == "auto":
        passed = [f"{candidate}: {obstacle}" for candidate, obstacle in obstacles.items() if obstacle]
        logger.info("%s: %s%s", kind, usable[0], f" ({'; '.join(passed)})" if passed else "")
        return usable[0]
    if name in usable:
        logger.info("%s: %s (asked for)", kind, name)
        return name
    reason = obstacles.get(name, "unknown name")
    raise ConfigError(f"{kind} {name!r} cannot be used here: {reason}; usable: {', '.join(['auto', *usable])}")
