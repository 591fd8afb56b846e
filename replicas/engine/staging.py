"""Numbers on their way between the host and a device, without either waiting for the other."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from replicas.engine.host_memory import to_device


def staged(values: Tensor | NDArray[Any] | Seq[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`values` on `device`, by a copy that nobody waits for. (One from ordinary memory would wait for everything that
    the device has been told to do before it.)
    """
    return to_device(torch.as_tensor(values, dtype=dtype), device)


def staged_together(
    parts: Seq[tuple[NDArray[Any] | Seq[float], torch.dtype]], device: torch.device
) -> tuple[Tensor, ...]:
    """Each part's values on `device` in its type. To a GPU they travel in one copy: many small ones take longer to
    start than to arrive."""
    tensors = [torch.as_tensor(values, dtype=dtype) for values, dtype in parts]
    if device.type != "cuda":
        return tuple(tensors)
    raw, places = _end_to_end(tensors, pin=True)
    return _apart(raw.to(device, non_blocking=True), tensors, places)


_ALIGNED = 16  # bytes: what kernels' widest loads ask for


def _end_to_end(tensors: Seq[Tensor], *, pin: bool) -> tuple[Tensor, list[int]]:
    """All bytes in one tensor, and where each begins."""
    places, size = [], 0
    for tensor in tensors:
        places.append(size)
        size += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
    raw = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    for copy, tensor in zip(_apart(raw, tensors, places), tensors, strict=True):
        copy.copy_(tensor)
    return raw, places


def _apart(raw: Tensor, like: Seq[Tensor], places: Seq[int]) -> tuple[Tensor, ...]:
    return tuple(
        raw[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, place in zip(like, places, strict=True)
    )


class Returned:
    """Copies of tensors for the host, on their way from a device since this was made."""

    def __init__(self, *tensors: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._copies = tensors
        if tensors and tensors[0].device.type == "cuda":
            self._copies = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors)
            for copy, tensor in zip(self._copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def lists(self) -> list[Any]:
        """Their values as lists, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return [copy.tolist() for copy in self._copies]
