"""docs/policies.md and deploy/policies/ say what the validator says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from policies.document import FleetNames, parse
from policies.document_schema import schema_text

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "policies.md").read_text()
EXAMPLES = sorted((ROOT / "deploy" / "policies").glob("*.yaml"))
SNIPPETS = re.findall(r"^```yaml\n(.*?)^```$", DOCS, re.DOTALL | re.MULTILINE)
FLEET = FleetNames(("llama-3.1-8b", "llama-3.3-70b", "gpt-4o-mini"))
FLEETS = {
    "laptop.yaml": FleetNames(("smollm2-135m-instruct",)),
    "gpu-node.yaml": FLEET,
    "paid-last.yaml": FleetNames(("qwen2.5-7b", "gpt-4o-mini")),
}


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_every_snippet_of_the_documentation_is_valid(snippet: str) -> None:
    parse(snippet, names=FLEET)


def keys(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        properties = schema.get("properties")
        if isinstance(properties, dict):
            yield from properties
        for part in schema.values():
            yield from keys(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from keys(part)


def test_every_key_is_explained() -> None:
    missing = {key for key in keys(json.loads(schema_text())) if not re.search(rf"\b{key}\b", DOCS)}
    assert not missing


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_documents_that_come_along_are_valid(path: Path) -> None:
    parse(path.read_text(), path.name, names=FLEETS[path.name])


def test_the_schema_beside_them_is_the_one_that_the_code_makes() -> None:
    """If this fails: signalbox policy schema > deploy/policies/policy.schema.json"""
    assert (ROOT / "deploy" / "policies" / "policy.schema.json").read_text() == schema_text()
    assert len(EXAMPLES) == 3
    for path in EXAMPLES:
        assert path.read_text().startswith("# yaml-language-server: $schema=policy.schema.json\n")
