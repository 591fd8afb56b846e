"""Fields of OpenAI's API that we know and do not implement, each with the values that ask for nothing.

Client libraries send many of these at their neutral value, so that one is accepted; any other is refused by name. A
field in neither table nor model is unknown and refused with the nearest name we do know.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from replicas.protocol import InvalidRequest, NotSupported, SignalboxError

Neutral = Callable[[Any], bool]


def _one_of(*values: object) -> Neutral:
    # compared with their types, because in Python False == 0 and True == 1
    def neutral(value: Any) -> bool:
        return any(type(value) is type(known) and value == known for known in values)

    return neutral


def _bool(value: Any) -> bool:
    return isinstance(value, bool)


_NOTHING = _one_of()
_OFF = _one_of(False)
_EMPTY_LIST = _one_of([])

CHAT: Mapping[str, Neutral] = {
    "audio": _NOTHING,
    "function_call": _one_of("none", "auto"),
    "functions": _EMPTY_LIST,
    "modalities": _one_of(["text"]),
    "moderation": _NOTHING,
    "parallel_tool_calls": _bool,
    "prediction": _NOTHING,
    "prompt_cache_options": _one_of({}),
    "prompt_cache_retention": _one_of("in_memory"),
    "reasoning_effort": _one_of("none"),
    "response_format": _one_of({"type": "text"}),
    "store": _OFF,
    "tool_choice": _one_of("none", "auto"),
    "tools": _EMPTY_LIST,
    "verbosity": _one_of("medium"),
    "web_search_options": _NOTHING,
}
COMPLETION: Mapping[str, Neutral] = {"echo": _OFF, "suffix": _one_of("")}
MESSAGE: Mapping[str, Neutral] = {
    "annotations": _EMPTY_LIST,
    "audio": _NOTHING,
    "function_call": _NOTHING,
    "reasoning_content": _NOTHING,
    "refusal": _NOTHING,
    "tool_call_id": _NOTHING,
    "tool_calls": _EMPTY_LIST,
}
PART: Mapping[str, Neutral] = {}


def check_extra(extra: Mapping[str, Any] | None, table: Mapping[str, Neutral], known: Iterable[str], at: str) -> None:
    """Raise for the first entry of `extra` that asks for something; null never does. `at` is the path of its object."""
    for name, value in (extra or {}).items():
        neutral = table.get(name)
        if neutral is None:
            raise _unknown(name, [*known, *table], at)
        if value is not None and not neutral(value):
            raise NotSupported(f"{at}{name} is not supported", param=f"{at}{name}")


def _unknown(name: str, known: list[str], at: str) -> SignalboxError:
    shown = name if len(name) <= 64 else name[:64] + "…"
    near = difflib.get_close_matches(shown, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return InvalidRequest(f"unknown field {at + shown!r}{hint}", param=at + shown)
