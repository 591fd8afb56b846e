"""What became of recent requests, and why: kept in memory, bounded, looked up by x-request-id.

No prompt, no answer, no key: names, numbers and the reasoning of every decision.
"""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.db.database import Database
from gateway.jobs import Attempt, Job
from gateway.ledger.report import attempts
from gateway.responses import total
from gateway.sessions import Session
from policies.budget import Price, usd
from policies.rightsize.choose import ModelChoice
from replicas.protocol import RequestError, Usage

EXPLAIN = "explain"  # the kind of question that a RecordBook answers


class UnknownRequest(RequestError):
    """No gateway remembers a request of that id."""


@dataclass(slots=True, kw_only=True)
class Step:
    """One model that worked on the request. role: "answer", "fallback", "cascade" (a first try) or "shadow".

    ttft_s: from the request's arrival to this model's first chunk. jobs hold prompts, so they go with `release`; what
    they came to is kept.
    """

    role: str
    model: str
    jobs: Sequence[Job]
    price: Price
    expected_output_tokens: float | None = None
    usage: Usage | None = None
    ttft_s: float | None = None
    mean_logprob: float | None = None
    escalated: bool | None = None
    agreement: float | None = None
    error: str | None = None
    _ids: list[str] = field(default_factory=list)
    _attempts: list[Attempt] = field(default_factory=list)
    _used: list[Usage] = field(default_factory=list)

    @property
    def answers(self) -> list[str]:
        """The answers' ids, by which the ledger knows what was paid for them."""
        ids = [*self._ids, *(job.request.request_id.partition("/")[0] for job in self.jobs)]
        return list(dict.fromkeys(ids))

    @property
    def attempts(self) -> list[Attempt]:
        return [*self._attempts, *(attempt for job in self.jobs for attempt in job.attempts)]

    @property
    def used(self) -> Usage | None:
        """What was answered or, of an answer that was cut short, what is known to have been made of it."""
        if self.usage is not None:
            return self.usage
        used = [*self._used, *(job.used for job in self.jobs if job.used is not None)]
        return total(used) if used else None

    @property
    def cost(self) -> int:
        """Pico-dollars of what was produced, as far as it is known."""
        used = self.used
        return self.price.cost(used) if used and (used.prompt_tokens or used.completion_tokens) else 0

    def release(self) -> None:
        """Nothing runs any more: forget prompts and bodies."""
        self._ids, self._attempts = self.answers, self.attempts
        self._used += [job.used for job in self.jobs if job.used is not None]
        self.jobs = ()


@dataclass(slots=True, kw_only=True)
class Record:
    """One request of a caller. `status` is the HTTP status that was sent, 0 while it runs, 499 when the client left."""

    request_id: str
    gateway: str
    key_id: str
    key_name: str
    endpoint: str
    asked: str = ""
    stream: bool = False
    generation: int = 0
    group: str | None = None
    choice: ModelChoice | None = None
    downgraded_from: str | None = None
    session: Session | None = None
    prompt_tokens: int = 0
    priority: int = 0
    time_limit_s: float | None = None
    steps: list[Step] = field(default_factory=list)
    at: float = field(default_factory=time.time)
    ended_s: float | None = None
    status: int = 0
    error: str | None = None
    failure: str = ""

    @property
    def answered(self) -> Step | None:
        """The model that answered, or was the last to try."""
        steps = [step for step in self.steps if step.role != "shadow"]
        spoke = [step for step in steps if step.ttft_s is not None]
        return next(reversed(spoke or steps), None)

    def release(self) -> None:
        """The caller has been answered: forget prompts and bodies."""
        for step in self.steps:
            if step.role != "shadow":
                step.release()

    @property
    def weight(self) -> int:
        """Bytes in memory, roughly."""
        terms = sum(
            len(attempt.decision.terms) * len(attempt.decision.candidates)
            for step in self.steps
            for attempt in step.attempts
        )
        return 1500 + 1000 * len(self.steps) + 40 * terms

    def shown(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "request_id": self.request_id,
            "created_at": self.at,
            "gateway": self.gateway,
            "key": {"id": self.key_id, "name": self.key_name},
            "endpoint": self.endpoint,
            "model_asked": self.asked,
            "stream": self.stream,
            "generation": self.generation,
            "prompt_tokens": self.prompt_tokens,
            "priority": self.priority,
            "time_limit_s": self.time_limit_s,
            "model_choice": _shown_choice(self.group, self.choice),
            "downgraded_from": self.downgraded_from,
            "session": self.session.outcome if self.session is not None else None,
            "steps": [_shown_step(step) for step in self.steps],
            "cost_usd": float(usd(sum(step.cost for step in self.steps if step.role != "shadow"))),
            "shadow_cost_usd": float(usd(sum(step.cost for step in self.steps if step.role == "shadow"))),
            "status": self.status or None,
            "error": self.error,
            "duration_s": self.ended_s,
        }


def _shown_choice(group: str | None, choice: ModelChoice | None) -> dict[str, Any] | None:
    if choice is None:
        return {"group": group} if group else None
    trade = {name: value for name, value in dataclasses.asdict(choice.trade).items() if value is not None}
    return {
        "group": group,
        "chosen": choice.model,
        "reason": choice.reason,
        "source": choice.source,
        "trade": trade,
        "candidates": [
            {
                "model": one.model,
                "predicted_quality": one.quality,
                "expected_cost_usd": one.cost,
                "utility": utility,
            }
            for one, utility in zip(choice.candidates, choice.utilities, strict=True)
        ],
        "skipped": list(choice.skipped),
    }


def _shown_step(step: Step) -> dict[str, Any]:
    usage = step.used
    attempts = step.attempts
    predicted = [a.decision.predicted_ms for a in attempts if a.error is None and a.decision.predicted_ms is not None]
    return {
        "role": step.role,
        "model": step.model,
        "predicted_ttft_ms": max(predicted) if predicted else None,
        "ttft_ms": None if step.ttft_s is None else step.ttft_s * 1e3,
        "expected_output_tokens": step.expected_output_tokens,
        "usage": None if usage is None else dataclasses.asdict(usage),
        "cost_usd": float(usd(step.cost)),
        "mean_logprob": step.mean_logprob,
        "escalated": step.escalated,
        "agreement": step.agreement,
        "error": step.error,
        "attempts": [_shown_attempt(attempt) for attempt in attempts],
        "answers": step.answers,
    }


def _shown_attempt(attempt: Attempt) -> dict[str, Any]:
    decision = attempt.decision
    return {
        "at": attempt.at,
        "policy": decision.policy,
        "replica": decision.replica_id,
        "predicted_ttft_ms": decision.predicted_ms,
        "uncached_tokens": decision.uncached_tokens,
        "new_blocks": decision.new_blocks,
        "candidates": [
            {"replica": name, **{term: values[number] for term, values in decision.terms.items()}}
            for number, name in enumerate(decision.candidates)
        ],
        "error": attempt.error,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """How much is kept; the oldest go first."""

    records: int = 50_000
    bytes: int = 64 * 2**20
    age_s: float = 3600.0


async def explained(book: RecordBook, database: Database, request_id: str) -> dict[str, Any] | None:
    """What a gateway knows of a request, with what its ledger reserved and settled for each step."""
    record = book.get(request_id)
    if record is None:
        return None
    shown = record.shown()
    for step in shown["steps"]:
        ids = step.pop("answers")
        step["ledger"] = await database.read(lambda connection, ids=ids: attempts(connection, ids))  # type: ignore[misc]
    return shown


class RecordBook:
    """The last requests by id. Of one id that a caller used twice, the newest."""

    def __init__(self, keep: Keep | None = None) -> None:
        self._keep = keep or Keep()
        self._records: OrderedDict[str, tuple[Record, int]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: Record) -> None:
        """When the request begins, and again when it has ended and weighs what it will weigh."""
        known = self._records.get(record.request_id)
        if known is not None and known[0] is record:
            self._bytes -= known[1]
        elif record.ended_s is not None:
            return  # dropped meanwhile, or its id was used again: the newer request has it
        else:
            self._drop(record.request_id)
        weight = record.weight
        self._records[record.request_id] = record, weight
        self._bytes += weight
        keep, oldest_at = self._keep, record.at - self._keep.age_s
        while len(self._records) > 1:
            oldest, _ = next(iter(self._records.values()))
            if len(self._records) <= keep.records and self._bytes <= keep.bytes and oldest.at >= oldest_at:
                break
            self._drop(oldest.request_id)

    def get(self, request_id: str) -> Record | None:
        found = self._records.get(request_id)
        if found is None or time.time() - found[0].at > self._keep.age_s:
            return None
        return found[0]

    def _drop(self, request_id: str) -> None:
        gone = self._records.pop(request_id, None)
        if gone is not None:
            self._bytes -= gone[1]
