"""The canonical form of a quantised matrix: integer codes, with a scale and an origin for each row and group of inputs.

For a weight [N, K] (N outputs, K inputs) in groups of g inputs, G = ceil(K / g), group(k) = k // g:

    zeros given     w[n, k] = (codes[n, k] - zeros[n, group(k)]) * scales[n, group(k)]
    mins given      w[n, k] = codes[n, k] * scales[n, group(k)] + mins[n, group(k)]
    neither         as with zeros of 2^(bits - 1) everywhere

The difference of integers is exact, so the first form rounds once; in the second the product is exact where scales have
16 bits (codes have at most 8, float32 holds 24), so it rounds once too. These float32 numbers are what every device
multiplies with.

Where the inputs of a group do not lie side by side (GPTQ's desc_act), the codes' columns are sorted by group and
`order` tells which input each column belongs to: x[:, order] @ codes-as-weights.T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BITS = (2, 4, 8)
_SCALE_TYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """bits: of a code, one of BITS. codes: uint8 [N, K]. scales: [N, G], a float type. zeros: uint8 or int16 [N, G].
    mins: [N, G], the scales' type. order: int64 [K], a permutation. At most one of zeros and mins."""

    bits: int
    group_size: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    mins: Tensor | None = None
    order: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.bits in BITS, f"codes of {self.bits} bits"
        assert self.codes.dtype is torch.uint8, f"codes are uint8, got {self.codes.dtype}"
        assert self.scales.dtype in _SCALE_TYPES, f"scales are floats, got {self.scales.dtype}"
        assert self.group_size >= 1, f"groups of {self.group_size} inputs"
        rows, columns = self.codes.shape
        groups = -(-columns // self.group_size)
        for name, tensor in (("scales", self.scales), ("zeros", self.zeros), ("mins", self.mins)):
            assert tensor is None or tensor.shape == (rows, groups), (
                f"{name} of shape {tensor.shape} for {groups} groups"
            )
        assert self.zeros is None or self.mins is None, "a group has one origin: zeros or mins"
        assert self.mins is None or self.mins.dtype is self.scales.dtype, "mins and scales have one type"
        assert self.order is None or self.order.shape == (columns,), "the order names every input"

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    @property
    def symmetric(self) -> bool:
        """The origin is 2^(bits - 1) everywhere and not stored."""
        return self.zeros is None and self.mins is None

    def dequantise(self) -> Tensor:
        """The float32 numbers [N, K] that this stands for, inputs in their own order."""
        wide = grouped(self.codes.float(), self.group_size)
        scales = self.scales.float().unsqueeze(-1)
        if self.mins is not None:
            wide = wide.mul_(scales).add_(self.mins.float().unsqueeze(-1))
        else:
            origin = float(2 ** (self.bits - 1)) if self.zeros is None else self.zeros.float().unsqueeze(-1)
            wide = wide.sub_(origin).mul_(scales)
        sorted_ = wide.flatten(1)[:, : self.codes.shape[1]]
        if self.order is None:
            return sorted_.contiguous()
        found = torch.empty_like(sorted_)
        found[:, self.order] = sorted_
        return found

    def rows(self, index: Tensor) -> QuantizedWeight:
        """Output rows `index` (int64 [R]), in that order."""
        return replace(
            self,
            codes=self.codes[index],
            scales=self.scales[index],
            zeros=None if self.zeros is None else self.zeros[index],
            mins=None if self.mins is None else self.mins[index],
        )

    def to(self, device: torch.device) -> QuantizedWeight:
        """A copy on `device`, whose tensors are no views of a file."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, copy=True)

        return replace(
            self,
            codes=self.codes.to(device, copy=True),
            scales=self.scales.to(device, copy=True),
            zeros=move(self.zeros),
            mins=move(self.mins),
            order=move(self.order),
        )

    def joins(self, other: QuantizedWeight) -> bool:
        """Whether `concatenate` can put the other's rows below these."""
        alike = (self.bits, self.group_size, self.codes.shape[1], self.scales.dtype) == (
            other.bits,
            other.group_size,
            other.codes.shape[1],
            other.scales.dtype,
        )
        origins = (self.zeros is None, self.mins is None) == (other.zeros is None, other.mins is None)
        return alike and origins and _same(self.zeros, other.zeros) and _same_order(self.order, other.order)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Both absent, or of one type."""
    return one is None or other is None or one.dtype is other.dtype


def _same_order(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def grouped(wide: Tensor, group_size: int) -> Tensor:
    """[N, K] -> [N, G, g]; the last group is filled up with zeros if it is short."""
    short = -wide.shape[1] % group_size
    if short:
        wide = torch.nn.functional.pad(wide, (0, short))
    return wide.view(wide.shape[0], -1, group_size)


def concatenate(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One matrix with the rows of all parts, which join (`QuantizedWeight.joins`) one another."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    assert all(first.joins(part) for part in parts), "these weights differ in more than their rows"

    def stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present) if present else None

    return replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=stack([part.zeros for part in parts]),
        mins=stack([part.mins for part in parts]),
    )


def sort_by_group(groups: Tensor, group_size: int) -> Tensor | None:
    """groups int [K]: the group of each input. -> the order that puts groups side by side, None if they are already.

    ValueError where a group (but the last) has not exactly group_size inputs.
    """
    columns = len(groups)
    wanted = torch.arange(columns, device=groups.device) // group_size
    groups = groups.long()
    if torch.equal(groups, wanted):
        return None
    order = torch.argsort(groups, stable=True)
    if not torch.equal(groups[order], wanted):
        counts = torch.bincount(groups.clamp(0), minlength=int(wanted[-1]) + 1)
        raise ValueError(f"does not put {group_size} inputs in every group: the counts begin {counts[:4].tolist()}")
    return order
