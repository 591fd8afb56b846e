"""What a checkpoint layout is to the engine: the tensors of a matrix, and how they become a QuantizedWeight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from replicas.engine.quantized import auto_round, awq, compressed, gptq
from replicas.engine.quantized.settings import Malformed, Need, Settings
from replicas.engine.quantized.weight import QuantizedWeight
from replicas.protocol import ConfigError

__all__ = ["READERS", "Malformed", "Need", "WeightFormat", "format_of"]


class WeightFormat(Protocol):
    """One layout with its parameters. `name` is its quant_method; `bits` of its narrowest codes."""

    @property
    def name(self) -> str: ...

    @property
    def bits(self) -> int: ...

    def needs(self, module: str, rows: int, columns: int) -> Mapping[str, Need]:
        """The tensors `<module>.<suffix>` of a matrix [rows, columns], by suffix.

        ConfigError if no matrix of that shape can be stored so.
        """
        ...

    def read(self, module: str, tensors: Mapping[str, Tensor], rows: int, columns: int) -> QuantizedWeight:
        """`tensors`: by suffix, of the shapes and types that `needs` asked for. Malformed names what cannot be."""
        ...


READERS: Mapping[str, Callable[[Settings], WeightFormat]] = {
    "awq": awq.parse,
    "gptq": gptq.parse,
    "compressed-tensors": compressed.parse,
    "auto-round": auto_round.parse,
}


def format_of(config: Mapping[str, Any]) -> WeightFormat | None:
    """The format that a config.json states as quantization_config; None if it states none, ConfigError if unknown."""
    raw = config.get("quantization_config", config.get("compression_config"))
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        raise ConfigError("'quantization_config' in config.json must be an object")
    method = raw.get("quant_method", "unnamed")
    parse = READERS.get(str(method))
    if parse is None:
        raise ConfigError(f"quant_method {method!r} in config.json is not supported; supported: {', '.join(READERS)}")
    return parse(Settings(raw))
