"""The policy document for machines: JSON Schema for editors, and what differs between two documents."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from policies.document import PolicyDocument
from policies.yaml_text import Loc, path_text


def schema() -> dict[str, Any]:
    """JSON Schema for editors."""
    document = PolicyDocument.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **document, "title": "Signalbox policy document"}


def schema_text() -> str:
    """The schema as it is kept beside the documents."""
    return json.dumps(schema(), indent=2) + "\n"


def changes(before: str, after: str) -> list[str]:
    """What differs between two normalised documents: one line per path, "- " gone, "+ " new, "~ " changed."""
    old, new = dict(_leaves(json.loads(before), ())), dict(_leaves(json.loads(after), ()))
    return [line for loc in sorted({*old, *new}, key=path_text) for line in _change(loc, old, new)]


def _change(loc: Loc, old: Mapping[Loc, str], new: Mapping[Loc, str]) -> list[str]:
    path = path_text(loc)
    if loc not in new:
        return [f"- {path}: {old[loc]}"]
    if loc not in old:
        return [f"+ {path}: {new[loc]}"]
    return [f"~ {path}: {old[loc]} -> {new[loc]}"] if old[loc] != new[loc] else []


def _leaves(value: Any, loc: Loc) -> Iterator[tuple[Loc, str]]:
    if isinstance(value, dict) and (value or not loc):
        for key, inner in value.items():
            yield from _leaves(inner, (*loc, key))
    else:
        yield loc, json.dumps(value, ensure_ascii=False)
