"""The policy document for machines: JSON Schema for editors, and what differs between two documents."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from policies.document import PolicyDocument
from policies.section import NOT_YET
from policies.yaml_text import Loc, path_text


def schema() -> dict[str, Any]:
    """JSON Schema for editors; keys that are not supported yet are there, and nothing is valid below them."""
    document = PolicyDocument.model_json_schema()
    definitions = document["$defs"]
    for key in sorted(NOT_YET):
        section, _, field = key.partition(".")
        holder = document if section == PolicyDocument.__name__ else definitions[section]
        holder["properties"][field] = {"description": "Not supported yet.", "not": {}}
    used = _referenced(document)
    document["$defs"] = {name: definitions[name] for name in sorted(definitions) if name in used}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **document, "title": "Signalbox policy document"}


def schema_text() -> str:
    """The schema as it is kept beside the documents."""
    return json.dumps(schema(), indent=2) + "\n"


def _referenced(schema: Mapping[str, Any]) -> set[str]:
    """Names of the definitions that can be reached from the document."""
    found: set[str] = set()
    ahead: list[Any] = [{key: value for key, value in schema.items() if key != "$defs"}]
    while ahead:
        part = ahead.pop()
        if isinstance(part, Mapping):
            name = str(part.get("$ref", "")).rpartition("/")[2]
            if name and name not in found:
                found.add(name)
                ahead.append(schema["$defs"][name])
            ahead += part.values()
        elif isinstance(part, list):
            ahead += part
    return found


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
