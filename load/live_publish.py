"""What must be true of requests that were answered while policies were being published. Pure: recorded facts in,
violations out.

A switch to a generation happens at one moment between the question `publish` and its answer. So by the client's own
clock, a request that began after the answer is served by that generation or a later one, and one that ended before the
question is not. Nothing is assumed of the gateways' clocks.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from load.live_client import Published, Reply

REPLICA_POLICIES = ("affinity", "least_load", "round_robin", "power_of_two", "cache_aware")


@dataclass(frozen=True, slots=True)
class Prescription:
    """What a generation says of a request to the group: the model that answers, the name that chooses its replica."""

    model: str
    policy: str


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of the traffic and what came of it."""

    request_id: str
    stream: bool
    due: float
    reply: Reply


@dataclass(frozen=True, slots=True)
class Violation:
    what: str
    detail: str


def document(number: int, group: str, models: Sequence[str]) -> tuple[str, Prescription]:
    """The number-th document of a rehearsal: successive ones differ in the model and in the replica policy.

    Without right_size a group's first model that has a ready replica answers; so the first one must.
    """
    first = number % len(models)
    order = (*models[first:], *models[:first])
    policy = REPLICA_POLICIES[number % len(REPLICA_POLICIES)]
    names = ", ".join(json.dumps(name) for name in order)
    return f"groups:\n  {group}:\n    models: [{names}]\naffinity:\n  policy: {policy}\n", Prescription(
        order[0], policy
    )


def possible(begun: float, ended: float, switches: Sequence[Published]) -> set[int]:
    """The generations that may have been active at some moment of [begun, ended]; switches in order of time."""
    found = set()
    for number, switch in enumerate(switches):
        until = switches[number + 1].answered if number + 1 < len(switches) else float("inf")
        if switch.asked <= ended and until >= begun:
            found.add(switch.generation)
    return found


def answered_by(asked: Asked) -> str:
    """The model that an answer names; ValueError says what is wrong with the answer."""
    if asked.reply.complaint:
        raise ValueError(asked.reply.complaint)
    if not asked.stream:
        found = asked.reply.fields()
        if not found.get("choices") or not found["choices"][0].get("finish_reason"):
            raise ValueError(f"no whole answer: {asked.reply.body[:120]!r}")
        return str(found["model"])
    events = [part[6:] for part in asked.reply.body.split(b"\n\n") if part.startswith(b"data: ")]
    if not events or events[-1] != b"[DONE]":
        raise ValueError("the stream ended without [DONE]")
    chunks = [json.loads(event) for event in events[:-1]]
    errors = [chunk["error"] for chunk in chunks if "error" in chunk]
    if errors:
        raise ValueError(f"an error in the stream: {errors[0]}")
    models = {str(chunk["model"]) for chunk in chunks}
    if len(models) != 1:
        raise ValueError(f"one stream names the models {sorted(models)}")
    if not any(choice.get("finish_reason") for chunk in chunks for choice in chunk["choices"]):
        raise ValueError("the stream has no finish_reason")
    return models.pop()


def check_request(
    asked: Asked,
    records: Sequence[Mapping[str, Any]],
    switches: Sequence[Published],
    prescribed: Mapping[int, Prescription],
) -> Violation | None:
    """The first thing that is wrong with a request and its explanation."""
    try:
        model = answered_by(asked)
    except ValueError as error:
        return Violation("failed request", f"{asked.request_id}: {error}")
    if len(records) != 1:
        return Violation("not explained exactly once", f"{asked.request_id}: {len(records)} explanations")
    record = records[0]
    generation = int(record["generation"])
    allowed = possible(asked.reply.begun, asked.reply.ended, switches)
    if generation not in allowed:
        return Violation(
            "a generation that was not active",
            f"{asked.request_id}: explained by {generation}, active while it ran: {sorted(allowed)}",
        )
    wanted = prescribed[generation]
    if model != wanted.model:
        return Violation(
            "another model than its generation's",
            f"{asked.request_id}: {model!r} answered, generation {generation} says {wanted.model!r}",
        )
    return _check_record(asked.request_id, record, wanted)


def _check_record(request_id: str, record: Mapping[str, Any], wanted: Prescription) -> Violation | None:
    steps = [(step["role"], step["model"]) for step in record["steps"]]
    policies = {attempt["policy"] for step in record["steps"] for attempt in step["attempts"]}
    if record["status"] != 200 or steps != [("answer", wanted.model)]:
        return Violation("explained as something else", f"{request_id}: status {record['status']}, steps {steps}")
    if policies != {wanted.policy}:
        said = f"replica chosen by {sorted(policies)}, generation {record['generation']} says {wanted.policy!r}"
        return Violation("another replica policy than its generation's", f"{request_id}: {said}")
    return None


def overlap_ms(records: Iterable[Mapping[str, Any]], switches: Sequence[Published]) -> float:
    """The longest time, in the gateways' own clocks, by which two of them were seen serving by different generations.

    For every switch: the last request that began by what was before it, on any gateway, minus the first that began by
    it, on any gateway. 0 where no such pair was seen. Switches back to an old generation are left out.
    """
    numbers = [switch.generation for switch in switches]
    once = [number for number in numbers if numbers.count(number) == 1]
    began: dict[int, list[float]] = defaultdict(list)
    for record in records:
        began[int(record["generation"])].append(float(record["created_at"]))
    longest = 0.0
    for number in once:
        newer = [at for one in once if one >= number for at in began[one]]
        older = [at for one in once if one < number for at in began[one]]
        if newer and older:
            longest = max(longest, max(older) - min(newer))
    return longest * 1e3


@dataclass(frozen=True, slots=True)
class Mistake:
    """A document that must be refused, and the line that the refusal must name."""

    what: str
    document: str
    line: int


def mistakes(group: str, models: Sequence[str]) -> tuple[Mistake, ...]:
    good, _ = document(0, group, models)
    unknown = good.replace(json.dumps(models[0]), '"no-such-model"')
    return (
        Mistake("a key that is misspelt", good.replace("  policy:", "  polcy:"), 5),
        Mistake("a model that the fleet has not", unknown, 3),
        Mistake("a value that is none", good.replace("policy: affinity", "policy: random"), 5),
        Mistake("text that is no YAML", good.replace("]\n", "\n", 1), 4),
    )
