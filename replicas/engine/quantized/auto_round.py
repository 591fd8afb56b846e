"""Checkpoints that auto-round writes under its own name: the tensors of GPTQ or AWQ, described in its own words.

packing_format "auto_round:auto_gptq"                 GPTQ v1
               "auto_round", "auto_round:gptqmodel"   GPTQ v2
               "auto_round:auto_awq"                  AWQ "gemm"
extra_config   what differs for some modules, by name or by a pattern that is somewhere in it; 16 bits: left as floats
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from replicas.engine.quantized import awq, gptq
from replicas.engine.quantized.layerwise import Layerwise, rules
from replicas.engine.quantized.settings import Settings

if TYPE_CHECKING:  # it imports the readers
    from replicas.engine.quantized.formats import WeightFormat

_NAME = "auto-round"


def _gptq(version: str) -> Callable[[Settings], WeightFormat]:
    return lambda settings: gptq.parse(settings.replaced({"checkpoint_format": version}))


_LAYOUTS: Mapping[str, Callable[[Settings], WeightFormat]] = {
    "auto_round:auto_gptq": _gptq("gptq"),
    "auto_round": _gptq("gptq_v2"),
    "auto_round:gptqmodel": _gptq("gptq_v2"),
    "auto_round:auto_awq": awq.parse,
}


def parse(settings: Settings) -> Layerwise:
    settings.choice("data_type", ("int",), "int")
    settings.choice("act_bits", (16, 32), 16)
    if "rotation_config" in settings:
        raise settings.refusal("rotation_config", settings.get("rotation_config"), "supported: null")
    layout = _LAYOUTS[settings.choice("packing_format", tuple(_LAYOUTS), "auto_round:auto_gptq")]
    changes = settings.objects("extra_config")
    exact = {re.escape(name) + "$": change for name, change in changes.items()}
    anywhere = {f".*(?:{name})": change for name, change in changes.items()}
    quantised = {name: change for name, change in (exact | anywhere).items() if change.get("bits") not in (16, 32)}
    return Layerwise(_NAME, layout(settings), rules(quantised, "extra_config", settings, layout))
