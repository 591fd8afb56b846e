"""Whether Triton's kernels can run on a device, and the few facts about it that launches depend on."""

from __future__ import annotations

import importlib.util
import os
import statistics
from collections.abc import Callable

import torch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Older cards lack bf16 products and asynchronous copies; none of the kernels was compiled for one.
_LEAST_CAPABILITY = (8, 0)
_INTERPRETED_MULTIPROCESSORS = 4


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter. Must be set before the first kernel module is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Why the Triton kernels cannot serve this device and type; "" if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in _DTYPES:
        return f"computes in float32, bfloat16 or float16, not in {str(dtype).removeprefix('torch.')}"
    if interpreting():
        return ""
    if device.type != "cuda":
        return f"runs on cuda, not on {device.type} (TRITON_INTERPRET=1 interprets it, slowly)"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return f"needs compute capability 8.0, {torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
    return ""


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once on `device`, at the least: what splitting work further than that is for."""
    if device.type != "cuda":
        return _INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def seconds_of(call: Callable[[], None], tries: int, before: Callable[[], object] = lambda: None) -> float:
    """The median by the current CUDA device's own clock; `before` comes before each of the tries, untimed."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(tries)]  # type: ignore[no-untyped-call]
    for start, end in pairs:
        before()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(float(start.elapsed_time(end)) for start, end in pairs) / 1e3


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
