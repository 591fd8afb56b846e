"""GPTQ checkpoints (Frantar et al. 2022, arXiv:2210.17323) as AutoGPTQ and GPTQModel write them; 2, 4 or 8 bits.

    qweight int32 [K * bits / 32, N]   a column is one run of bits along K, lowest first
    qzeros  int32 [G, N * bits / 32]   a row is one run of bits along N
    scales  [G, N], G = ceil(K / g)
    g_idx   int32 [K]                  the group of each input; with desc_act they are not side by side

    w[k, n] = s[g_idx[k], n] * (q[k, n] - z[g_idx[k], n])

checkpoint_format "gptq" (v1) stores z - 1, "gptq_v2" stores z.
dynamic: "+:pattern" names modules with settings of their own, "-:pattern" those that were left as floats.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from replicas.engine.quantized.layerwise import Layerwise, rules
from replicas.engine.quantized.packing import unpack
from replicas.engine.quantized.settings import FLOATS, Malformed, Need, Settings, finite, whole_words
from replicas.engine.quantized.weight import QuantizedWeight, sort_by_group

logger = logging.getLogger(__name__)


def parse(settings: Settings) -> Gptq | Layerwise:
    uniform = _uniform(settings)
    changes = {
        rule.removeprefix("+:"): change
        for rule, change in settings.objects("dynamic").items()
        if not rule.startswith("-:")  # what their weights' type says too
    }
    if not changes:
        return uniform
    return Layerwise(uniform.name, uniform, rules(changes, "dynamic", settings, _uniform))


def _uniform(settings: Settings) -> Gptq:
    bits = settings.choice("bits", (2, 4, 8))  # integers of 3 bits straddle words: not built
    if bits == 2:
        logger.warning("weights of 2 bits lose much quality whatever made them; 4 bits are the least that lose little")
    return Gptq(
        bits=bits,
        group_size=settings.group_size(),
        first_zero=1 if settings.choice("checkpoint_format", ("gptq", "gptq_v2"), "gptq") == "gptq" else 0,
        desc_act=settings.choice("desc_act", (True, False), False),
    )


@dataclass(frozen=True, slots=True)
class Gptq:
    """first_zero: what a stored 0 among the zeros means."""

    bits: int
    group_size: int
    first_zero: int
    desc_act: bool
    name: str = "gptq"

    def needs(self, module: str, rows: int, columns: int) -> Mapping[str, Need]:
        groups = -(-columns // self._group(columns))
        return {
            "qweight": Need(((whole_words(module, "inputs", columns, self.bits), rows),), ("I32",)),
            "qzeros": Need(((groups, whole_words(module, "outputs", rows, self.bits)),), ("I32",)),
            "scales": Need(((groups, rows),), FLOATS),
            "g_idx": Need(((columns,),), ("I32", "I64"), optional=not self.desc_act),
        }

    def _group(self, columns: int) -> int:
        return columns if self.group_size == -1 else self.group_size

    def read(self, module: str, tensors: Mapping[str, Tensor], rows: int, columns: int) -> QuantizedWeight:
        codes = unpack(tensors["qweight"].T.contiguous(), self.bits, columns)
        zeros = unpack(tensors["qzeros"], self.bits, rows).T.to(torch.int16) + self.first_zero
        if self.bits < 8:
            zeros = zeros.to(torch.uint8)
        scales = finite("scales", tensors["scales"]).T
        order = None
        if "g_idx" in tensors:
            try:
                order = sort_by_group(tensors["g_idx"], self._group(columns))
            except ValueError as error:
                raise Malformed("g_idx", str(error)) from error
        if order is not None:
            codes = codes[:, order]
        return QuantizedWeight(
            bits=self.bits,
            group_size=self._group(columns),
            codes=codes.contiguous(),
            scales=scales.contiguous(),
            zeros=zeros.contiguous(),
            order=order,
        )
