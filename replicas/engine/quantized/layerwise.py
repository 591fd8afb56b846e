"""A layout whose bits or groups differ by module: rules that name modules, over what config.json says of all."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from replicas.engine.quantized.settings import Need, Settings
from replicas.engine.quantized.weight import QuantizedWeight

if TYPE_CHECKING:  # it imports the readers, and they this file
    from replicas.engine.quantized.formats import WeightFormat


@dataclass(frozen=True, slots=True)
class Layerwise:
    """rules: a pattern that a module's name must begin with, and its layout; the first that fits counts."""

    name: str
    otherwise: WeightFormat
    rules: Sequence[tuple[re.Pattern[str], WeightFormat]] = ()

    @property
    def bits(self) -> int:
        return min(layout.bits for layout in (self.otherwise, *(layout for _, layout in self.rules)))

    def _of(self, module: str) -> WeightFormat:
        return next((layout for pattern, layout in self.rules if pattern.match(module)), self.otherwise)

    def needs(self, module: str, rows: int, columns: int) -> Mapping[str, Need]:
        return self._of(module).needs(module, rows, columns)

    def read(self, module: str, tensors: Mapping[str, Tensor], rows: int, columns: int) -> QuantizedWeight:
        return self._of(module).read(module, tensors, rows, columns)


def rules(
    changes: Mapping[str, Mapping[str, Any]], key: str, settings: Settings, parse: Callable[[Settings], WeightFormat]
) -> Sequence[tuple[re.Pattern[str], WeightFormat]]:
    """changes: by pattern, what is other than in `settings` for the modules it names; `key`: where that is stated.

    ConfigError for what is no regular expression or no layout.
    """
    found = []
    for pattern, change in changes.items():
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise settings.refusal(key, pattern, f"it is no regular expression: {error}") from error
        found.append((compiled, parse(settings.replaced(change))))
    return found
