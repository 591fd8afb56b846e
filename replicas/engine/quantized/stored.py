"""The quantised matrices of a safetensors folder: which there are, whether they are whole, and what they hold.

A matrix whose `<module>.weight` is there in a float type was left out of the quantisation
(`modules_to_not_convert`, `ignore`, a head); every other one must be stored as the format says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from replicas.engine.quantized.formats import Malformed, Need, WeightFormat, format_of
from replicas.engine.quantized.settings import FLOATS
from replicas.engine.quantized.weight import QuantizedWeight
from replicas.protocol import ConfigError

# Where writers older than config.json's quantization_config put it, and the method that they all meant.
_OLD_FILES = {"quant_config.json": "awq", "quantize_config.json": "gptq"}


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor in a file: safetensors' name of its type."""

    file: str
    shape: tuple[int, ...]
    kind: str


def weight_format(
    folder: Path, config: Mapping[str, Any], read_json: Callable[[Path], dict[str, Any]]
) -> WeightFormat | None:
    """What config.json, or an older writer's file beside it, says of the weights; None if they are plain floats."""
    if (found := format_of(config)) is not None:
        return found
    for name, method in _OLD_FILES.items():
        if (folder / name).is_file():
            return format_of({"quantization_config": {"quant_method": method, **read_json(folder / name)}})
    return None


class StoredMatrices:
    """`matrices`: every linear layer's weight [rows, columns] by module; `held`: all tensors of the folder by name.

    ConfigError, naming file and tensor, for what is missing or has another shape or type than the format says.
    """

    def __init__(
        self, form: WeightFormat, matrices: Mapping[str, tuple[int, int]], held: Mapping[str, Held], files: str
    ) -> None:
        self._form, self._held = form, held
        self._matrices: dict[str, tuple[int, int]] = {}
        self._needs: dict[str, Mapping[str, Need]] = {}
        for module, shape in matrices.items():
            plain = held.get(f"{module}.weight")
            if plain is not None and plain.kind in (*FLOATS, "F64"):
                continue
            self._matrices[module] = shape
            self._needs[module] = needs = form.needs(module, *shape)
            for suffix, need in needs.items():
                _check(f"{module}.{suffix}", need, held, files)

    def __contains__(self, module: str) -> bool:
        return module in self._matrices

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def owns(self, name: str) -> bool:
        """Whether the format has a use for the tensor `name`."""
        module, _, suffix = name.rpartition(".")
        return suffix in self._needs.get(module, ())

    def read(self, module: str, tensor: Callable[[str], Tensor]) -> QuantizedWeight:
        """`tensor(name)` reads the folder's. ConfigError for values that cannot be."""
        names = {suffix: f"{module}.{suffix}" for suffix in self._needs[module]}
        tensors = {suffix: tensor(name) for suffix, name in names.items() if name in self._held}
        try:
            return self._form.read(module, tensors, *self._matrices[module])
        except Malformed as error:
            name = names[error.suffix]
            raise ConfigError(f"{self._held[name].file}: tensor {name!r} {error.reason}") from error


def _check(name: str, need: Need, held: Mapping[str, Held], files: str) -> None:
    found = held.get(name)
    if found is None:
        if need.optional:
            return
        raise ConfigError(f"{files}: tensor {name!r} is missing")
    if found.shape not in need.shapes:
        expected = " or ".join(map(str, need.shapes))
        raise ConfigError(f"{found.file}: tensor {name!r} has shape {found.shape}, expected {expected}")
    if found.kind not in need.kinds:
        expected = " or ".join(need.kinds)
        raise ConfigError(f"{found.file}: tensor {name!r} has the type {found.kind}, expected {expected}")
