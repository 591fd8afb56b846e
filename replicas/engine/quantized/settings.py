"""What readers of checkpoint layouts share: typed look-ups in quantization_config, and what a stored matrix needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from replicas.protocol import ConfigError

FLOATS = ("F16", "BF16", "F32")


class Malformed(Exception):
    """A stored tensor, given by its suffix, holds what its format forbids; `reason` continues "tensor X …"."""

    def __init__(self, suffix: str, reason: str) -> None:
        super().__init__(suffix, reason)
        self.suffix, self.reason = suffix, reason


@dataclass(frozen=True, slots=True)
class Need:
    """A tensor that a matrix is stored in. shapes: any of them. kinds: safetensors' names of types, any of them."""

    shapes: tuple[tuple[int, ...], ...]
    kinds: tuple[str, ...]
    optional: bool = False


class Settings:
    """A quantization_config; look-ups raise ConfigError naming the key, the value and what is supported."""

    def __init__(self, values: Mapping[str, Any], path: str = "quantization_config") -> None:
        self._values, self._path = values, path

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def get(self, key: str, default: Any = None) -> Any:
        value = self._values.get(key)
        return default if value is None else value

    def choice(self, key: str, supported: tuple[Any, ...], default: Any = None) -> Any:
        """The value (strings in lower case), which must be one of `supported`."""
        value = self.get(key, default)
        if isinstance(value, str):
            value = value.lower()
        if type(value) not in {type(one) for one in supported} or value not in supported:
            raise self.refusal(key, value, f"supported: {', '.join(map(str, supported))}")
        return value

    def group_size(self, default: int | None = None) -> int:
        """-1: all inputs of a row are one group."""
        size = self.get("group_size", default)
        if type(size) is not int or (size != -1 and (size < 4 or size % 4)):
            raise self.refusal("group_size", size, "supported: -1 and multiples of 4")
        return size

    def inner(self, key: str) -> Settings:
        value = self.get(key)
        if not isinstance(value, Mapping):
            raise self.refusal(key, value, "it must be an object")
        return Settings(value, f"{self._path}.{key}")

    def objects(self, key: str) -> Mapping[str, Mapping[str, Any]]:
        """An object of objects, such as settings by module; empty if it is not stated."""
        return {name: self.inner(key).inner(name)._values for name in self.get(key, {})}

    def replaced(self, changes: Mapping[str, Any]) -> Settings:
        """These with `changes` over them."""
        return Settings({**self._values, **changes}, self._path)

    def refusal(self, key: str, value: Any, why: str) -> ConfigError:
        return ConfigError(f"{self._path}.{key} {value!r} in config.json is not supported; {why}")


def whole_groups(module: str, columns: int, group_size: int) -> int:
    """Groups of a row of `columns` inputs; ConfigError unless they fill it evenly."""
    size = columns if group_size == -1 else group_size
    if columns % size:
        raise ConfigError(f"tensor {module!r} has {columns} inputs, which groups of {size} do not divide")
    return columns // size


def whole_words(module: str, what: str, count: int, bits: int) -> int:
    """32-bit words that `count` integers fill; ConfigError unless they do so evenly."""
    if count * bits % 32:
        raise ConfigError(
            f"tensor {module!r} has {count} {what}, which do not fill words of 32 bits at {bits} bits each"
        )
    return count * bits // 32


def finite(suffix: str, scales: Tensor) -> Tensor:
    if not bool(torch.isfinite(scales.float()).all()):
        raise Malformed(suffix, "holds numbers that are not finite")
    return scales
