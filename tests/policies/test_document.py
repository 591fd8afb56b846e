"""The policy document: what it says, what it refuses and where it says the mistake is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
import yaml

from policies import canary, yaml_text
from policies.document import (
    EMPTY,
    Affinity,
    FleetNames,
    Group,
    PolicyDocument,
    PredictorUnusable,
    Session,
    decode,
    load_predictors,
    parse,
    read_text,
    with_lines,
)
from policies.document_schema import changes, schema
from policies.peers import POLICIES
from policies.rightsize.choose import RightSizeView, Trade
from policies.rightsize.guarantee import Promise
from policies.yaml_text import DocumentError
from replicas.protocol import ConfigError

WHOLE = """\
models:
  big:
    price: {input: 2.5, cached_input: 1.25, output: 10}
    strength: 0.9
groups:
  auto:
    models: [small, big]
    right_size: {cost_weight: 0.4, expected_output_tokens: 300}
    cascade: {small: small, strong: big, min_mean_logprob: -0.7}
    guarantee: {strong: big, agreement: 0.95, share: 5%, usd_per_day: 2}
aliases: {fast: small, default: auto}
affinity: {policy: least_load}
fallbacks:
  big: [small]
canary: {share: 10%, salt: spring}
"""
FLEET = FleetNames(("small", "big"), ("tiny",))


def refused(text: str, names: FleetNames | None = None) -> str:
    with pytest.raises(DocumentError) as error:
        parse(text, "p.yaml", names=names)
    assert all(one.line >= 1 for one in error.value.mistakes)
    return error.value.message


def test_the_empty_document_means_every_model_by_its_own_name_with_affinity() -> None:
    document = parse("{}", names=FLEET)
    assert document == EMPTY
    assert document.affinity.policy == "affinity"
    assert document.target("small") == "small"
    assert document.normalised() == "{}"


def test_every_section_arrives_as_the_types_that_the_policies_take() -> None:
    document = parse(WHOLE, names=FLEET)
    group = document.target("default")
    assert isinstance(group, Group)
    assert group is document.target("auto")
    assert group.models == ("small", "big")
    assert group.right_size is not None
    assert group.right_size.trade == Trade(cost_weight=0.4)
    assert group.cascade is not None
    assert (group.cascade.rule.small, group.cascade.rule.threshold) == ("small", -0.7)
    assert group.guarantee is not None
    assert group.guarantee.promise == Promise(strong="big", agreement=0.95, share=0.05, budget=2.0)
    assert document.target("fast") == "small"
    assert document.canary is not None
    assert document.canary.share == pytest.approx(0.1)


def test_defaults_are_those_of_the_code_they_belong_to() -> None:
    group = parse("groups: {g: {models: [a], right_size: {quality_floor: 1}, guarantee: {strong: a}}}").groups["g"]
    assert group.right_size is not None
    assert group.guarantee is not None
    view = RightSizeView(models=(), trade=group.right_size.trade)
    assert group.right_size.expected_output_tokens == view.expected_output_tokens
    assert group.guarantee.promise == Promise(strong="a")


def test_the_names_of_replica_policies_are_the_table_s() -> None:
    assert set(get_args(Affinity.model_fields["policy"].annotation)) == set(POLICIES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gruops: {}\n", "p.yaml:1: gruops: unknown key; did you mean 'groups'?"),
        ("groups:\n  auto:\n    models: [a]\n    right_sise: {}\n",
         "p.yaml:4: groups.auto.right_sise: unknown key; did you mean 'right_size'?"),
        ("groups:\n  models:\n    models: [a]\n    right_size:\n      cost_wieght: 1\n",
         "p.yaml:5: groups.models.right_size.cost_wieght: unknown key; did you mean 'cost_weight'?"),
        ("affinity:\n  policy: rond_robin\n", "did you mean 'round_robin'?"),
        ("groups:\n  auto:\n    right_size: {cost_weight: 1}\n", "p.yaml:2: groups.auto.models: Field required"),
        ("groups:\n  auto:\n    models:\n      - a\n      - b\n      - a\n",
         "p.yaml:6: groups.auto.models[2]: 'a' is listed twice"),
        ("groups:\n  auto:\n    models: [a]\n    right_size: {}\n",
         "p.yaml:4: groups.auto.right_size: needs exactly one of"),
        ("groups: {g: {models: [a], right_size: {cost_weight: 1, quality_floor: 1}}}", "needs exactly one of"),
        ("groups: {g: {models: [a], guarantee: {strong: a}}}", "needs right_size"),
        ("groups:\n  g:\n    models: [a, b]\n    cascade: {small: a, strong: c, min_mean_logprob: -1}\n",
         "p.yaml:4: groups.g.cascade.strong: 'c' is not among the group's models"),
        ("groups: {g: {models: [a], cascade: {small: a, strong: a, min_mean_logprob: -1}}}",
         "another model than small"),
        ("groups: {g: {models: [a, b], cascade: {small: a, strong: b, min_mean_logprob: 1}}}",
         "less than or equal to 0"),
        ("groups: {a: {models: [x]}}\naliases: {a: x}\n", "p.yaml:2: aliases.a: 'a' is a group already"),
        ("aliases:\n  a: b\n  b: c\n", "p.yaml:2: aliases.a: 'b' is an alias itself"),
        ("fallbacks:\n  a:\n    - b\n    - a\n", "p.yaml:4: fallbacks.a[1]: a model cannot stand in for itself"),
        ("fallbacks: {a: [g]}\ngroups: {g: {models: [b]}}\n", "'g' is no model's own name"),
        ("models:\n  a:\n    strength: 2\n", "p.yaml:3: models.a.strength: "),
        ("models:\n  a:\n    price: {input: -1}\n", "p.yaml:3: models.a.price.input: "),
        ("models: {a: {price: {input: true}}}", "valid number"),
        ("models: {a: {price: {input: '1'}}}", "valid number"),
        ("models: {a: {price: {input: .inf}}}", "'.inf' is not a finite decimal number"),
        ("models: {a: {strength: .nan}}", "'.nan' is not a finite decimal number"),
        ("models: {a: {strength: 1e999}}", "not a finite decimal number"),
        ("models: {a: {strength: 010}}", "not a finite decimal number"),
        ("models: {a: {strength: 1:30}}", "not a finite decimal number"),
        ("aliases:\n  a: no\n", "p.yaml:2: aliases.a: write true or false, or put quotes round 'no'"),
        ("aliases:\n  a: 7\n", "p.yaml:2: aliases.a: Input should be a valid string; put quotes round it"),
        ("aliases:\n  a: 2026-01-01\n", "p.yaml:2: aliases.a: put quotes round '2026-01-01'"),
        ("priorities:\n  classes: {chat: 0}\n  default: chta\n",
         "p.yaml:3: priorities.default: 'chta' is not among the classes; did you mean 'chat'?"),
        ("priorities:\n  classes: {chat: 0}\n  default: chat\n  tiers:\n    flex: {to: batch}\n",
         "p.yaml:5: priorities.tiers.flex.to: 'batch' is not among the classes; known: chat"),
        ("priorities:\n  classes: {chat: 101}\n  default: chat\n", "p.yaml:2: priorities.classes.chat: "),
        ("priorities: {classes: {}, default: chat}", "at least 1 item"),
        ("priorities: {classes: {a: 0}, default: a, tiers: {fast: {to: a}}}", "'flex' or 'priority'"),
        ("admission:\n  max_queued: 0\n", "p.yaml:2: admission.max_queued: "),
        ("admission:\n  max_qeued: 1\n", "did you mean 'max_queued'?"),
        ("admission:\n  deadline_s: 5\n  max_deadline_s: 1\n", "p.yaml:1: admission: deadline_s must not be longer"),
        ("admission: {models: {a: {deadline_s: 1}}}", "unknown key"),
        ("retries:\n  on: [lsot]\n", "p.yaml:2: retries.on[0]: Input should be 'lost', "),
        ("retries:\n  on: [lsot]\n", "did you mean 'lost'?"),
        ("retries:\n  attempts: 17\n", "p.yaml:2: retries.attempts: "),
        ("retries:\n  breaker: {failures: 0, cooldown_s: 1}\n", "p.yaml:2: retries.breaker.failures: "),
        ("retries:\n  breaker: {failures: 1}\n", "p.yaml:2: retries.breaker.cooldown_s: Field required"),
        ("retries: {models: {a: {breaker: {failures: 1, cooldown_s: 1}}}}", "unknown key"),
        ("hedging:\n  a: {max_share: 5%}\n", "p.yaml:2: hedging.a: needs exactly one of after_s and after_quantile"),
        ("budgets:\n  - {key: a, usd: 5000000, window: day}\n", "p.yaml:2: budgets[0].usd: Input should be less than"),
        ("models:\n  a:\n    price: {input: 1e300}\n", "p.yaml:3: models.a.price.input: Input should be less than"),
        ("fallbacks:\n  a: b\n", "p.yaml:2: fallbacks.a: must be a list"),
        ("hedging:\n  a: {after_s: 1}\n", "p.yaml:2: hedging.a.max_share: Field required"),
        ("hedging:\n  a: {after_s: 1, max_share: 5%, to: a}\n", "p.yaml:2: hedging.a.to: must be another model"),
        ("canary: {share: 0}", "greater than 0"),
        ("canary: {share: 101%}", "less than or equal to 1"),
        ("canary: {share: five%}", "a percentage like 5%"),
        ("canary: {share: nan%}", "finite number"),
        ("groups:\n  a: {models: [x]}\n  a: {models: [y]}\n", "p.yaml:3: groups: 'a' is given twice"),
        ("groups:\n  '': {models: [x]}\n", "p.yaml:2: groups.: String should have at least 1 character"),
        ("a: !!python/object:os.system {}\n", "p.yaml:1: the tag"),
        ("? [a]\n: b\n", "a key must be a text"),
        ("{}\n---\n{}\n", "p.yaml:2: not valid YAML"),
        ("groups:\n  a: [\n", "p.yaml:3: not valid YAML"),
        ("a: \x07\n", "p.yaml:1: not valid YAML"),
        ("a:\n  - \ud800\n", "p.yaml:2: is not valid Unicode"),
        ('aliases:\n  "a\\0": b\n', "p.yaml:2: aliases: holds a character that cannot be stored"),
        ('aliases:\n  a: "b\\0"\n', "p.yaml:2: aliases.a: holds a character that cannot be stored"),
        ('{"x\\ny": 1}', "p.yaml:1: 'x\\ny': unknown key"),
        ("", "p.yaml:1: is empty"),
        ("# nothing\n", "is empty"),
        ("- a\n", "must be a mapping"),
        ("null\n", "must be a mapping"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line_and_path(text: str, message: str) -> None:
    assert message in refused(text)


def test_budgets_limits_and_sessions_have_their_shape() -> None:
    document = parse(
        """\
budgets:
  - {key: "*", usd: 5, window: day, alerts: {at: [50%, 0.9], webhook: "https://ops.example/hook"}}
  - {team: acme, tokens: 1000000, window: month, downgrade: {at: 90%, to: small}}
rate_limits: [{key: alice, requests_per_minute: 60, concurrency: 4}]
groups: {auto: {models: [small, big], session: {keep_model: true}}}
"""
    )
    assert [budget.window for budget in document.budgets] == ["day", "month"]
    assert document.groups["auto"].session == Session(keep_model=True, idle_s=900.0)
    for text in ("budgets: [{usd: 5, window: day}]", "budgets: [{key: a, window: day}]", "rate_limits: [{key: a}]"):
        assert "must" in refused(text)


def test_every_mistake_is_reported_at_once_and_the_number_of_lines_is_bounded() -> None:
    assert len(refused("gruops: {}\naffinty: {}\ncanary: {share: 2}\n").splitlines()) == 3
    assert len(refused("".join(f"x{number}: 1\n" for number in range(200))).splitlines()) == yaml_text.MAX_SHOWN + 1


def test_names_are_checked_against_the_fleet_with_a_suggestion() -> None:
    message = refused(
        "groups:\n  auto: {models: [small, bg]}\naliases: {fast: smal}\nfallbacks: {nobody: [big]}\n", FLEET
    )
    assert message.splitlines() == [
        "p.yaml:2: groups.auto.models[1]: the fleet has no model 'bg'; did you mean 'big'?",
        "p.yaml:4: fallbacks.nobody: the fleet has no model 'nobody'; known: small, big",
        "p.yaml:3: aliases.fast: there is no model or group 'smal'; did you mean 'small'?",
    ]
    assert "the fleet has a model or alias 'tiny'" in refused("groups: {tiny: {models: [small]}}", FLEET)
    assert "the fleet has a model or alias 'big'" in refused("aliases: {big: small}", FLEET)


def test_an_upstream_cannot_be_what_only_a_replica_can() -> None:
    fleet = FleetNames(("small", "big"), upstreams=("small",))
    text = (
        "groups:\n  auto:\n    models: [small, big]\n"
        "    cascade: {small: small, strong: big, min_mean_logprob: -1}\n"
        "hedging:\n  small: {after_s: 1, max_share: 5%}\n"
    )
    with pytest.raises(DocumentError) as refused:
        parse(text, "p.yaml", names=fleet)
    assert "p.yaml:4: groups.auto.cascade.small: 'small' is an upstream" in str(refused.value)
    assert "p.yaml:6: hedging.small: an upstream has no other replica" in str(refused.value)
    parse(text, names=FleetNames(("small", "big")))


def test_anchors_and_merges_work_and_lines_are_those_of_what_counts() -> None:
    text = "models:\n  a: &m {strength: 0.5}\n  b: *m\n  c:\n    <<: *m\n    strength: 0.7\n"
    text += "  d:\n    <<: *m\n    strength: 7\n"
    assert "p.yaml:9: models.d.strength" in refused(text)
    document = parse(text.replace("strength: 7", "price: {input: 1}"))
    assert [document.models[name].strength for name in "abcd"] == [0.5, 0.5, 0.7, 0.5]


LAUGHS = "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]\n" for n in range(1, 12))
BOMBS = {
    "self": "a: &a [*a]\n",
    "self as mapping": "a: &a {b: *a}\n",
    "self as merge": "a: &a\n  <<: *a\n",
    "laughs": "x0: &x0 [a, a, a, a, a, a, a, a, a]\n" + LAUGHS,
    "lists": "a: " + "[" * 5000,
    "mappings": "a: " + "{a: " * 5000,
    "merges": "a: &x {}\n" + "".join(f"b{n}:\n  <<: *x\n" for n in range(60000)),
    "mistakes": "groups:\n" + "".join(f"  g{n}: {{modles: 1}}\n" for n in range(40000)),
    "size": "a: '" + "x" * yaml_text.MAX_BYTES + "'\n",
    "number": "a: " + "9" * 10_000,
    "dashes": "a: " + "- " * 10_000,
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS.keys())
def test_bombs_are_refused_in_bounded_time(text: str) -> None:
    assert len(refused(text)) < 20_000


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_text(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="cannot read"):
        read_text(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"# fine\naliases: {a: \xe9}\n")
    with pytest.raises(DocumentError, match=r"latin\.yaml:2: is not UTF-8"):
        read_text(tmp_path / "latin.yaml")
    (tmp_path / "large.yaml").write_bytes("é".encode() * yaml_text.MAX_BYTES)
    assert "the limit is" in refused(read_text(tmp_path / "large.yaml"))
    assert decode(b"{}", "x") == "{}"


def test_a_predictor_must_be_there_and_be_the_one_that_is_named(tmp_path: Path) -> None:
    text = "groups:\n  auto:\n    models: [a, b]\n    right_size:\n      cost_weight: 1\n"
    text += f"      predictor: {{path: chat, sha256: '{'0' * 64}'}}\n"
    with pytest.raises(PredictorUnusable) as missing:
        load_predictors(parse(text), tmp_path)
    assert "cannot read" in missing.value.reason
    assert with_lines(text, "p.yaml", missing.value).message.startswith("p.yaml:6: groups.auto.right_size.predictor: ")


def test_the_schema_accepts_what_the_validator_accepts() -> None:
    published = schema()
    check = jsonschema.Draft202012Validator(published)
    check.check_schema(published)
    check.validate(yaml.safe_load(WHOLE))
    check.validate({})
    wrong = [{"gruops": {}}, {"canary": {"share": 0}}, {"groups": {"g": {}}}]
    wrong += [{"groups": {"g": {"models": ["a"], "session": {"idle_s": 0}}}}]
    assert not [one for one in wrong if check.is_valid(one)]


def test_changes_name_each_path_once() -> None:
    before, after = (
        parse("aliases: {a: x, b: y}\n"),
        parse("aliases: {a: x, b: z, c: x}\naffinity: {policy: affinity}\n"),
    )
    assert changes(before.normalised(), after.normalised()) == [
        '+ affinity.policy: "affinity"',
        '~ aliases.b: "y" -> "z"',
        '+ aliases.c: "x"',
    ]
    assert changes(after.normalised(), after.normalised()) == []
    assert changes("{}", '{"groups": {}}') == ["+ groups: {}"]


def test_the_normalised_document_says_the_same_again() -> None:
    document = parse(WHOLE)
    assert parse(document.normalised()) == document
    assert json.loads(document.normalised())["canary"] == {"salt": "spring", "share": 0.1}


def test_documents_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        PolicyDocument().affinity = Affinity()  # type: ignore[misc]


def test_a_growing_share_never_takes_a_key_out_and_is_met_closely() -> None:
    keys = [f"key_{number:016x}" for number in range(20_000)]
    before: set[str] = set()
    for share in (0.01, 0.05, 0.2, 0.5, 0.99, 1.0):
        served = {key for key in keys if canary.serves(key, share, "signalbox")}
        assert before <= served
        assert len(served) / len(keys) == pytest.approx(share, abs=0.015)
        before = served
    assert before == set(keys)
    assert {key for key in keys if canary.serves(key, 0.05, "other")} != {
        key for key in keys if canary.serves(key, 0.05, "signalbox")
    }


def test_the_draw_of_keys_is_the_same_for_ever() -> None:
    """A constant written down once: should it change, canaries in flight would change hands at an upgrade."""
    assert [n for n in range(12) if canary.serves(f"key_{n}", 0.3, "signalbox")] == [0, 3, 5]
