"""Whatever stands in the text: it is accepted, or refused with a line that exists. Nothing else ever happens."""

from __future__ import annotations

import random

import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from policies.document import FleetNames, PolicyDocument, parse
from policies.yaml_text import DocumentError
from tests.policies.test_document import WHOLE

FLEET = FleetNames(("small", "big"))

KEYS = sorted(
    {part.strip("{[ ,:-") for line in WHOLE.splitlines() for part in line.split()} | {"<<", "session", "&a", "*a"}
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([*KEYS, "5%"]) | st.text(max_size=8)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
)


def outcome(text: str) -> PolicyDocument | None:
    """The document, None for one that is refused as it should be."""
    try:
        return parse(text, "p", names=FLEET)
    except DocumentError as error:
        refused = error
    assert refused.mistakes
    assert all(1 <= one.line <= text.count("\n") + 2 for one in refused.mistakes)
    assert refused.message.startswith(f"p:{refused.mistakes[0].line}: ")
    return None


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_a_document_with_characters_changed_never_crashes(seed: int, count: int) -> None:
    rng = random.Random(seed)
    text = WHOLE
    for _ in range(count):
        at, length = rng.randrange(len(text)), rng.choice((0, 1, 1, 3))
        text = (
            text[:at]
            + rng.choice(["", " ", "\n", "\t", *"{}[]:,-&*!|>'\"%@`#0.~", "<<: ", "é", "\x00"])
            + text[at + length :]
        )
    outcome(text)


@given(st.integers(0, 2**32), values)
def test_a_document_with_a_value_replaced_never_crashes(seed: int, value: object) -> None:
    rng = random.Random(seed)
    document = yaml.safe_load(WHOLE)
    at = document
    while True:
        key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
        if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.7:
            at = at[key]
        else:
            at[key] = value
            break
    outcome(yaml.safe_dump(document, allow_unicode=True))


@given(st.text(max_size=200))
@example("a: 0b_")
@example("a: ._")
@example("a: 0x_")
@example("? ")
@example("=: =")
@example("{a: !}")
@example("%YAML 9.9\n---\na: b\n")
@example("\ufeffaliases: {}")
@example("a: -.e5")
def test_no_text_crashes(text: str) -> None:
    outcome(text)


@given(values)
def test_what_is_accepted_says_the_same_when_it_is_written_out(value: object) -> None:
    document = outcome(yaml.safe_dump({"groups": {"auto": value}}))
    if isinstance(document, PolicyDocument):
        assert parse(document.normalised()) == document
