"""compressed-tensors checkpoints (llm-compressor), weights in integers of 4 or 8 bits.

format "pack-quantized"   weight_packed int32 [N, ceil(K * bits / 32)], lowest first, value + 2^(bits-1)
                          weight_zero_point int32 [ceil(N * bits / 32), G], packed along N in the same way
                          weight_shape int64 [2]: N, K
format "int-quantized"    weight int8 [N, K], weight_zero_point int8 [N, G]
both                      weight_scale [N, G] (G = 1 for a scale per channel)
                          weight_g_idx int32 [K] where groups follow the order of activations
                          weight_zero_point only where the scheme is asymmetric

w = (q - z) * s, in signed integers
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from replicas.engine.quantized.kv_scales import check_scheme
from replicas.engine.quantized.packing import unpack, words_for
from replicas.engine.quantized.settings import FLOATS, Malformed, Need, Settings, finite, whole_groups
from replicas.engine.quantized.weight import QuantizedWeight, sort_by_group
from replicas.protocol import ConfigError

logger = logging.getLogger(__name__)

_FORMATS = ("pack-quantized", "int-quantized")


def parse(settings: Settings) -> Compressed:
    overall = settings.get("format")
    groups = settings.inner("config_groups")
    schemes = [_scheme(groups.inner(name), overall) for name in settings.get("config_groups")]
    if not schemes:
        raise settings.refusal("config_groups", {}, "it must state how weights are stored")
    if "kv_cache_scheme" in settings:
        check_scheme(settings.inner("kv_cache_scheme"))
    _no_rotations_at_run_time(settings)
    return Compressed(tuple(schemes), min(scheme.bits for scheme in schemes))


def _no_rotations_at_run_time(settings: Settings) -> None:
    """ConfigError for a transform of activations; those that were folded into weights need nothing."""
    if "transform_config" not in settings:
        return
    for name, transform in settings.inner("transform_config").objects("config_groups").items():
        places = [applied.get("location") for applied in transform.get("apply", ())]
        if any(not str(place).startswith("weight_") for place in places):
            raise settings.refusal(f"transform_config.config_groups.{name}", places, "supported: weight_*")


def _scheme(group: Settings, overall: object) -> Scheme:
    weights = group.inner("weights")
    bits = weights.choice("num_bits", (4, 8))
    weights.choice("type", ("int",), "int")
    weights.choice("dynamic", (False,), False)
    strategy = weights.choice("strategy", ("group", "channel", "tensor"), "tensor")
    if "output_activations" in group:
        raise group.refusal("output_activations", group.get("output_activations"), "supported: null")
    if "input_activations" in group:
        if not group.inner("input_activations").get("dynamic", False):
            raise group.refusal("input_activations", group.get("input_activations"), "supported: null and dynamic")
        logger.warning("activations are computed in full precision: their rounding to integers is not built")
    reordered = weights.get("actorder") in ("group", "dynamic", True)
    if reordered and strategy != "group":
        raise weights.refusal("actorder", weights.get("actorder"), f"strategy {strategy!r} has no groups to order")
    stored = group.choice("format", _FORMATS, overall or ("pack-quantized" if bits == 4 else "int-quantized"))
    return Scheme(
        bits=bits,
        group_size=weights.group_size() if strategy == "group" else -1,
        per_tensor=strategy == "tensor",
        symmetric=weights.choice("symmetric", (True, False), True),
        packed=stored == "pack-quantized",
        reordered=reordered,
        targets=tuple(group.get("targets", ["Linear"])),
    )


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the modules that `targets` name are stored. group_size -1: one group a row."""

    bits: int
    group_size: int
    per_tensor: bool
    symmetric: bool
    packed: bool
    reordered: bool
    targets: Sequence[str]

    def names(self, module: str) -> bool:
        return any(
            re.match(target.removeprefix("re:"), module) if target.startswith("re:") else target == module
            for target in self.targets
        )


@dataclass(frozen=True, slots=True)
class Compressed:
    schemes: Sequence[Scheme]
    bits: int
    name: str = "compressed-tensors"

    def _of(self, module: str) -> Scheme:
        """A scheme that names the module itself, else the one for all linear layers."""
        for scheme in self.schemes:
            if scheme.names(module):
                return scheme
        for scheme in self.schemes:
            if "Linear" in scheme.targets:
                return scheme
        raise ConfigError(f"quantization_config.config_groups in config.json says nothing of tensor {module!r}")

    def needs(self, module: str, rows: int, columns: int) -> Mapping[str, Need]:
        scheme = self._of(module)
        groups = whole_groups(module, columns, scheme.group_size)
        scales = ((1,), (1, 1)) if scheme.per_tensor else ((rows, groups), *(((rows,),) if groups == 1 else ()))
        needs = {"weight_scale": Need(scales, FLOATS)}
        if scheme.packed:
            needs["weight_packed"] = Need(((rows, words_for(columns, scheme.bits)),), ("I32",))
            needs["weight_shape"] = Need(((2,),), ("I64", "I32"), optional=True)
            zeros = Need(((words_for(rows, scheme.bits), groups),), ("I32",))
        else:
            needs["weight"] = Need(((rows, columns),), ("I8",))
            zeros = Need(scales, ("I8",))
        if not scheme.symmetric:
            needs["weight_zero_point"] = zeros
        elif not scheme.packed:
            needs["weight_zero_point"] = Need(scales, ("I8",), optional=True)  # written by old versions, all zero
        if scheme.reordered:
            needs["weight_g_idx"] = Need(((columns,),), ("I32", "I64"))
        return needs

    def read(self, module: str, tensors: Mapping[str, Tensor], rows: int, columns: int) -> QuantizedWeight:
        scheme = self._of(module)
        size = columns if scheme.group_size == -1 else scheme.group_size
        groups = columns // size
        if "weight_shape" in tensors and tensors["weight_shape"].tolist() != [rows, columns]:
            raise Malformed("weight_shape", f"says {tensors['weight_shape'].tolist()}, expected {[rows, columns]}")
        scales = finite("weight_scale", tensors["weight_scale"]).reshape(-1, groups).expand(rows, groups)
        if scheme.packed:
            codes = unpack(tensors["weight_packed"], scheme.bits, columns)
        else:
            codes = _shifted(tensors["weight"])
        order = None
        if scheme.reordered:
            try:
                order = sort_by_group(tensors["weight_g_idx"], size)
            except ValueError as error:
                raise Malformed("weight_g_idx", str(error)) from error
        if order is not None:
            codes = codes[:, order]
        # int-quantized codes fill a byte whatever their nominal width
        bits = scheme.bits if scheme.packed else 8
        return QuantizedWeight(
            bits=bits,
            group_size=size,
            codes=codes.contiguous(),
            scales=scales.contiguous(),
            zeros=self._zeros(scheme, tensors.get("weight_zero_point"), rows, groups),
            order=order,
        )

    def _zeros(self, scheme: Scheme, stored: Tensor | None, rows: int, groups: int) -> Tensor | None:
        if stored is None:
            return None
        if scheme.packed:
            return unpack(stored.T, scheme.bits, rows).T.contiguous()
        if scheme.symmetric and not bool(stored.any()):
            return None
        return _shifted(stored).reshape(-1, groups).expand(rows, groups).contiguous()


def _shifted(signed: Tensor) -> Tensor:
    """int8 -> uint8, 128 added."""
    return signed.view(torch.uint8) ^ 128
