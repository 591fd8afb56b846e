"""One rule for choosing among kernels that may or may not be usable here: every name says why not, or is taken."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from replicas.engine import native
from replicas.protocol import ConfigError

logger = logging.getLogger(__name__)


def native_obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Why the C++ kernels cannot serve this device and type; "" if they can. Builds them on the first call."""
    if device.type != "cpu":
        return f"runs on cpu, not on {device.type}"
    if dtype is not torch.float32:
        return f"computes in float32, not in {str(dtype).removeprefix('torch.')}"
    return "" if native.library() is not None else native.why_not()


def reason(name: str, obstacles: Mapping[str, str], *, asked: bool) -> str:
    """Why `name` was taken, in brackets, for logs and status: asked for, or what better ones could not; or ""."""
    if asked:
        return " (asked for)"
    candidates = list(obstacles)
    passed = [f"no {candidate}: {obstacles[candidate]}" for candidate in candidates[: candidates.index(name)]]
    return f" ({'; '.join(passed)})" if passed else ""


def pick(kind: str, name: str, obstacles: Mapping[str, str]) -> str:
    """The name to use out of `obstacles` (best first, each with why it cannot be used or "").

    "auto" takes the first without an obstacle and logs what it passed over. A name that cannot be had raises
    ConfigError with the reason and the names that can.
    """
    usable = [candidate for candidate, obstacle in obstacles.items() if not obstacle]
    if name != "auto" and name not in usable:
        obstacle = obstacles.get(name, "unknown name")
        raise ConfigError(f"{kind} {name!r} cannot be used here: {obstacle}; usable: {', '.join(['auto', *usable])}")
    chosen = usable[0] if name == "auto" else name
    logger.info("%s: %s%s", kind, chosen, reason(chosen, obstacles, asked=name != "auto"))
    return chosen
