"""What else than a model's weights an engine's settings name, found on the machine where it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from replicas.protocol import ConfigError


def resolved(settings: Mapping[str, Any], resolve: Callable[[str], str]) -> dict[str, Any]:
    """Engine settings with local paths for the heads or the draft model that speculation guesses with.

    Names the setting in what `resolve` refuses.
    """
    speculative = dict(settings.get("speculative") or {})
    for name in ("heads", "model"):
        if source := speculative.get(name):
            try:
                speculative[name] = resolve(source)
            except ConfigError as error:
                raise ConfigError(f"speculative.{name}: {error.message}", param=f"speculative.{name}") from error
    return {**settings, "speculative": speculative} if speculative else dict(settings)
