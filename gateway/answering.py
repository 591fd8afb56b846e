"""From a parsed request to a model that has begun to answer: select, plan, dispatch, and the next model if need be.

Up to the first chunk nothing is promised, so another model may take over (a group's next best, a fallback); what the
caller got wrong is found before, or fails alike everywhere. Knows nothing of bodies and status lines.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gateway import dispatch, passing
from gateway.billing import Bill, claimant
from gateway.config import GatewayConfig, Retries
from gateway.deadline import OnTime
from gateway.explain import Record, Step
from gateway.fleet import Fleet
from gateway.hedging import Hedges, Runner
from gateway.jobs import Job
from gateway.keys import ApiKey
from gateway.ledger.ledger import Ledger
from gateway.metrics import Metrics, ModelMetrics
from gateway.models import Model, item_path
from gateway.passing import PassedRequest
from gateway.requests import ChatRequest, CompletionRequest
from gateway.responses import Shape, total
from gateway.routes import route_request
from gateway.rules import Rules
from gateway.sessions import Sessions
from gateway.telemetry import Laps
from gateway.upstreams import UpstreamModel
from policies.budget import Subject, downgrade
from policies.rightsize.cascade import Cascade, confidence
from policies.selection import ModelGroup, Selection, Size, keep, select_from, select_model
from replicas.protocol import (
    BudgetExceeded,
    Chunk,
    ContextLengthExceeded,
    EngineFault,
    GenerateRequest,
    InvalidRequest,
    RateLimited,
    RequestError,
    Unavailable,
    Usage,
)
from replicas.upstream_messages import UpstreamRequest

if TYPE_CHECKING:
    from gateway.tracing import Trace

# Reserved where neither caller nor fleet file says how long an upstream's answer may become.
_MOST_TOKENS_OF_AN_UPSTREAM = 4096
# On the books, who pays for what is run to check answers.
SHADOW_KEY = "(shadow)"

# Attempts that no caller asked for.
_OURS = ("shadow", "hedge")

Request = ChatRequest | CompletionRequest | PassedRequest
AnyChunks = AsyncGenerator[list[Any], None]  # of Chunk, or of UpstreamChunk
Prompts = list[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Kind:
    """What distinguishes one endpoint from the other.

    param names the field that holds the prompt; operation is what traces call this. encode tokenises: (request, model,
    tenant) -> token ids per prompt.
    """

    request: type[Any]
    shape: Shape
    id_prefix: str
    param: str
    operation: str
    encode: Callable[[Any, Model, str], Awaitable[Prompts]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One caller's request on its way through this gateway.

    body: as it came. unsupported: why no local engine can do this, where only an upstream may be able to; `request`
    then is a PassedRequest. first_try: the caller says that it has not sent this before. until: its deadline, by the
    loop's clock. trace: None where nobody traces. caller_trace: traceparent and tracestate as they came, for upstreams,
    where nobody does.
    """

    kind: Kind
    request: Any
    body: bytes
    key: ApiKey
    unsupported: RequestError | None = None
    first_try: bool = False
    rules: Rules
    record: Record
    laps: Laps
    until: float | None = None
    trace: Trace | None = None
    caller_trace: tuple[str | None, str | None] = (None, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A model that has begun to answer: its first chunks, and the stream of the rest."""

    id: str
    model: Model | UpstreamModel
    metrics: ModelMetrics
    step: Step
    first: list[Any]
    stream: AnyChunks | OnTime[list[Any]]
    selection: Selection
    choices: int

    @property
    def prompts(self) -> int:
        """How many usages the stream brings: one per job."""
        return len(self.step.jobs)

    @property
    def passed(self) -> bool:
        """Whether an upstream's chunks are passed on."""
        return isinstance(self.model, UpstreamModel)

    def settle(self, usages: Sequence[Usage]) -> Usage:
        """The bill, when every prompt has ended; EngineFault where one has not."""
        if len(usages) != self.prompts:
            raise EngineFault("the replica ended a request without its terminal chunk")
        self.step.usage = usage = total(usages)
        self.metrics.settled(usage)
        return usage


class Answering:
    def __init__(self, fleet: Fleet, metrics: Metrics, ledger: Ledger, sessions: Sessions) -> None:
        self._ledger = ledger
        self._sessions = sessions
        self._fleet = fleet
        self._metrics = metrics
        self._hedges = Hedges(metrics)

    async def open(self, asked: Asked, safety_scale: Callable[[ModelGroup], float]) -> Opened:
        """The first model of the selection that begins to answer; its stream is the caller's to close.

        Raises what the last one raised when none does.
        """
        chosen = await self._select(asked, safety_scale)
        selection = await self._downgraded(asked, chosen)
        if selection is not chosen:
            try:
                return await self._first(asked, selection, selection.models)
            except ContextLengthExceeded:
                # of a model that nobody asked for: a long prompt is no reason to refuse who is near a budget
                selection, asked.record.downgraded_from = chosen, None
        if selection.cascade is None:
            return await self._first(asked, selection, selection.models)
        unsure: list[Chunk] = []
        kept = await self._provisional(asked, selection, unsure)
        if kept is not None:
            return kept
        try:
            opened = await self._first(asked, selection, selection.models[1:], patient=not unsure)
        except (Unavailable, BudgetExceeded, RateLimited, ContextLengthExceeded):
            if not unsure:
                raise
            # an answer that the small model was not sure of, and that is paid for, is better than none
            return await self._replay(asked, selection, unsure)
        tried = next(step for step in asked.record.steps if step.role == "cascade")
        if tried.usage is not None:
            self._metrics.models[tried.model].settled(tried.usage)
        return opened

    async def _first(
        self, asked: Asked, selection: Selection, models: Sequence[str], *, patient: bool = True
    ) -> Opened:
        """The first of the models that begins to answer. A stand-in that the request does not fit is passed over."""
        absent: Unavailable | None = None
        for number, name in enumerate(models):
            role = "answer" if number == 0 else "fallback"
            last = number == len(models) - 1
            try:
                return await self._open(asked, selection, name, role, _retries(asked, name, last and patient))
            except Unavailable as error:
                absent = error
                if last:
                    raise
            except ContextLengthExceeded:
                if absent is None:
                    raise
        assert absent is not None, "a selection names at least one model"
        raise absent

    async def whole(self, asked: Asked, name: str, role: str) -> tuple[Step, list[Any]]:
        """Everything that a model answers, for somebody other than the caller."""
        step, stream, _ = await self._start(asked, name, role, _retries(asked, name, False), whole=True)
        try:
            async with aclosing(stream):
                chunks = [chunk async for ready in stream for chunk in ready]
        except Unavailable as error:
            step.error = error.message
            raise
        step.usage = total([chunk.usage for chunk in chunks if chunk.usage is not None])
        return step, chunks

    # ---------------------------------------------------------------------------------------------- which model

    async def _select(self, asked: Asked, safety_scale: Callable[[ModelGroup], float]) -> Selection:
        target = asked.rules.resolve(asked.request.model)
        asked.laps.lap("parse")
        able = None if asked.unsupported is None else self._fleet.upstreams.keys()
        if not isinstance(target, ModelGroup):
            selection = select_model(target.name, asked.rules)
            return selection if able is None else _only(selection, able, asked)
        if able is not None and not any(model.name in able for model in target.models):
            assert asked.unsupported is not None, "there is no other reason for a choice"
            raise asked.unsupported
        counts = await self._prompt_tokens(asked, target)
        size = Size(
            text=asked.request.subject,
            prompt_tokens=sum(counts),
            longest_prompt=max(counts),
            max_tokens=asked.request.token_limit,
        )
        selection = select_from(target, asked.rules, self._fleet, size, safety_scale(target), able)
        selection = selection if able is None else _only(selection, able, asked)
        if target.keep_s is not None and (messages := asked.request.turns) is not None:
            asked.record.session = session = await self._sessions.find(asked.key.tenant, target.name, messages)
            selection = keep(selection, session.began, self._fleet, size)
            session.outcome = selection.session or ""
        asked.record.group, asked.record.choice = target.name, selection.choice
        asked.laps.lap("select")
        return selection

    async def remember(self, asked: Asked, opened: Opened) -> None:
        """Note with which model a conversation has begun, where its group keeps it: before anything is sent."""
        session, group = asked.record.session, opened.selection.group
        if session is None or group is None or group.keep_s is None:
            return
        names = {model.name for model in group.models}
        if session.began in names:
            self._sessions.goes_on(session, group.keep_s)
        elif opened.model.name in names and asked.record.downgraded_from is None:
            await self._sessions.begin(session, opened.model.name, group.keep_s, asked.until)

    async def _downgraded(self, asked: Asked, selection: Selection) -> Selection:
        """A caller who is near a budget's cap is answered by the model that the budget names, if it says so."""
        first, key = selection.models[0], asked.key
        accounts = asked.rules.budgets.accounts(Subject(key=key.name, team=key.tenant, model=first))
        if not any(account.budget.downgrade for account in accounts):
            return selection
        to = downgrade(accounts, await self._ledger.used(accounts))
        if to is None or to == first or (asked.unsupported is not None and to not in self._fleet.upstreams):
            return selection
        asked.record.downgraded_from = first
        return replace(selection, models=(to, *(name for name in selection.models if name != to)), cascade=None)

    async def _prompt_tokens(self, asked: Asked, group: ModelGroup) -> list[int]:
        """As the first candidate that is ready counts them; its encodings are kept, so long ones are not made twice."""
        names = [model.name for model in group.models]
        name = next((name for name in names if self._fleet.ready(name)), names[0])
        upstreams = self._fleet.upstreams
        if asked.unsupported is not None:
            name = next(name for name in names if name in upstreams)
        if name in upstreams:
            return [await upstreams[name].prompt_tokens(self._passed(asked).body, len(asked.body))]
        model = await self._fleet.model(self._fleet.served(name), asked.rules.retries[name].wait_s)
        return list(map(len, await asked.kind.encode(asked.request, model, asked.key.tenant)))

    # ------------------------------------------------------------------------------------------------- running it

    async def _open(self, asked: Asked, selection: Selection, name: str, role: str, retries: Retries) -> Opened:
        step, stream, model = await self._start(asked, name, role, retries, whole=not asked.request.stream)
        if (hedging := asked.rules.document.hedging) and name in hedging:
            answer = await self._hedges.answer(self, asked, Runner(step, stream, model), hedging[name])
            return self._opened(asked, selection, answer.model, answer.step, answer.first_chunks, answer.stream)
        try:
            first = await anext(stream, None)  # which ends the stream where it raises
        except Unavailable as error:
            step.error = error.message
            raise
        if not first:
            await stream.aclose()
            raise EngineFault("the replica ended a request without an answer")
        return self._opened(asked, selection, model, step, first, stream)

    async def second(self, asked: Asked, first: Step, to: str | None) -> tuple[Step, AnyChunks, Any] | None:
        """Another replica that is about to be asked what `first` was, or the model `to`; None where there is none."""
        name = to or first.model
        retries = replace(asked.rules.retries[name], attempts=1, wait_s=0.0)
        if to is not None:
            able = asked.unsupported is None or to in self._fleet.upstreams
            if not able or not self._fleet.ready(to):
                return None
            return await self._start(asked, to, "hedge", retries, whole=not asked.request.stream)
        if self._fleet.ready(name) <= max(len({one.decision.replica_id for one in job.attempts}) for job in first.jobs):
            return None
        answer_id = f"{asked.kind.id_prefix}-{secrets.token_hex(12)}"
        count = len(first.jobs)
        jobs = [job.again(job_id(answer_id, number, count), "hedge") for number, job in enumerate(first.jobs)]
        model = await self._fleet.model(self._fleet.served(name), 0.0)
        return self._begun(asked, name, "hedge", jobs), self._streams(asked, jobs, retries), model

    def _streams(self, asked: Asked, jobs: Sequence[Job], retries: Retries) -> AnyChunks:
        streams = [dispatch.generate(self._fleet, job, retries) for job in jobs]
        return streams[0] if len(streams) == 1 else dispatch.merged(streams, asked.request.choices)

    def _opened(
        self,
        asked: Asked,
        selection: Selection,
        model: Model | UpstreamModel,
        step: Step,
        first: list[Any],
        stream: AnyChunks,
    ) -> Opened:
        asked.laps.lap("first_chunk")
        if model.name == asked.record.downgraded_from:  # what its budget prefers could not answer
            asked.record.downgraded_from = None
        metrics = self._metrics.models[model.name]
        step.ttft_s = max(job.first_at or 0.0 for job in step.jobs) - asked.laps.began
        metrics.time_to_first_token.observe(step.ttft_s)
        return Opened(
            id=step.jobs[0].request.request_id.partition("/")[0],
            model=model,
            metrics=metrics,
            step=step,
            first=first,
            stream=stream if asked.until is None else OnTime(stream, asked.until),
            selection=selection,
            choices=asked.request.prompt_count * asked.request.choices,
        )

    async def _start(
        self, asked: Asked, name: str, role: str, retries: Retries, *, whole: bool
    ) -> tuple[Step, AnyChunks, Model | UpstreamModel]:
        upstream = self._fleet.upstreams.get(name)
        if upstream is not None:
            job = await self._passed_job(asked, upstream, role, whole=whole)
            return self._begun(asked, name, role, [job]), upstream.generate(job, retries), upstream
        model = await self._fleet.model(self._fleet.served(name), retries.wait_s)
        jobs = await self._plan(asked, model, role, whole=whole)
        step = self._begun(asked, name, role, jobs)
        return step, self._streams(asked, jobs, retries), model

    def _begun(self, asked: Asked, name: str, role: str, jobs: list[Job]) -> Step:
        """The step of a model that is about to be asked, on the request's record."""
        record, group = asked.record, asked.rules.groups.get(asked.record.group or "")
        if role not in _OURS:
            asked.laps.lap("tokenise")
            record.prompt_tokens = sum(job.prompt_tokens for job in jobs)
        expected = group.expected_output_tokens if group and group.trade else None
        step = Step(role=role, model=name, jobs=jobs, price=asked.rules.prices[name], expected_output_tokens=expected)
        record.steps.append(step)
        return step

    @staticmethod
    def _priority(asked: Asked, model: str) -> int:
        key, request = asked.key, asked.request
        if request.priority is None and asked.rules.document.priorities is None:
            return 0
        subject = Subject(key=key.name, team=key.tenant, model=model)
        return asked.rules.priority(subject, request.service_tier, request.priority)

    def _bill(self, asked: Asked, model: str, role: str) -> Bill:
        """A shadow is run for our own sake: it is on the books, but on no key's account. A hedge is ours to limit."""
        key, rules = asked.key, asked.rules
        subject = Subject(key=SHADOW_KEY if role == "shadow" else key.name, team=key.tenant, model=model)
        limits = () if role in _OURS else rules.limits.applying(subject)
        return Bill(
            ledger=self._ledger,
            subject=subject,
            price=rules.prices[model],
            accounts=() if role == "shadow" else rules.budgets.accounts(subject),
            limits=limits,
            claimant=claimant(key.id, asked.body) if limits else b"",
            fresh=asked.first_try,
        )

    def _passed(self, asked: Asked) -> PassedRequest:
        request = asked.request
        return request if isinstance(request, PassedRequest) else passing.read(asked.body, asked.kind.param)

    async def _passed_job(self, asked: Asked, upstream: UpstreamModel, role: str, *, whole: bool) -> Job:
        """The whole body as one job, however many prompts it has."""
        body = dict(self._passed(asked).body)
        self._priority(
            asked, upstream.name
        )  # an upstream has its own queue; what is asked must be allowed all the same
        body.pop("priority", None)
        if asked.request.token_limit is None and upstream.card.default_max_tokens:
            body["max_tokens"] = upstream.card.default_max_tokens
        request = UpstreamRequest(
            request_id=f"{asked.kind.id_prefix}-{secrets.token_hex(12)}",
            body=body,
            prompt_tokens=await upstream.prompt_tokens(body, len(asked.body)),
            unary=not asked.request.stream,
            traceparent=asked.caller_trace[0],
            tracestate=asked.caller_trace[1],
            deadline=None if role == "shadow" else asked.until,
            doubt=asked.unsupported if isinstance(asked.unsupported, InvalidRequest) else None,
        )
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or _MOST_TOKENS_OF_AN_UPSTREAM
        return Job(
            model=upstream.name,
            request=request,
            route=None,
            generation=asked.rules.generation,
            whole=whole,
            max_tokens=limit * request.choices,
            bill=self._bill(asked, upstream.name, role),
            role=role,
            until=request.deadline,
            trace=asked.trace,
        )

    async def _plan(self, asked: Asked, model: Model, role: str, *, whole: bool) -> list[Job]:
        """One job per prompt; everything the caller may have got wrong is found here at the latest."""
        kind, request, rules = asked.kind, asked.request, asked.rules
        prompts = await kind.encode(request, model, asked.key.tenant)
        answer_id = f"{kind.id_prefix}-{secrets.token_hex(12)}"
        wanted = 0 if role == "cascade" and request.logprobs_wanted is None else request.logprobs_wanted
        bill = self._bill(asked, model.name, role)
        priority = self._priority(asked, model.name)
        if priority and role not in _OURS:
            asked.record.priority = priority
        jobs = []
        for number, ids in enumerate(prompts):
            param = item_path(kind.param, number, len(prompts))
            max_tokens = model.max_tokens(len(ids), request.token_limit, param)
            sampling = request.sampling(max_tokens, wanted, model.card.vocab_size)
            request_id = job_id(answer_id, number, len(prompts))
            job = Job(
                model=model.name,
                request=GenerateRequest(
                    request_id=request_id,
                    prompt_token_ids=ids,
                    sampling=sampling,
                    tenant=asked.key.tenant,
                    fair_key=asked.key.id,
                    priority=priority,
                ),
                route=route_request(model.card, asked.key.tenant, request_id, ids, max_tokens),
                policy=rules.policy,
                generation=rules.generation,
                whole=whole,
                max_tokens=max_tokens * sampling.n,
                bill=bill,
                role=role,
                trace=asked.trace,
                until=None if role == "shadow" else asked.until,
                bounds=rules.bounds.get(model.name),
            )
            jobs.append(job)
        return jobs

    # --------------------------------------------------------------------------------------------------- cascade

    async def _provisional(self, asked: Asked, selection: Selection, unsure: list[Chunk]) -> Opened | None:
        """The small model's whole answer if it is sure enough of it; else None, and the answer goes into `unsure`."""
        cascade = selection.cascade
        assert cascade is not None, "asked for only where there is one"
        try:
            step, chunks = await self.whole(asked, cascade.small, "cascade")
        except Unavailable:
            return None
        if self._escalates(cascade, step, chunks):
            unsure += chunks
            return None
        return await self._replay(asked, selection, chunks)

    async def _replay(self, asked: Asked, selection: Selection, chunks: list[Chunk]) -> Opened:
        """The small model's answer, which is whole, as the answer."""
        step = next(step for step in asked.record.steps if step.role == "cascade")
        model = await self._fleet.model(self._fleet.served(step.model), 0.0)
        stream = _replayed(chunks)
        return self._opened(asked, selection, model, step, await anext(stream), stream)

    @staticmethod
    def _escalates(cascade: Cascade, step: Step, chunks: Sequence[Chunk]) -> bool:
        step.mean_logprob = confidence([token.logprob for chunk in chunks for token in chunk.logprobs])
        step.escalated = step.mean_logprob < cascade.threshold
        return step.escalated


def _retries(asked: Asked, model: str, last: bool) -> Retries:
    """Only the last model is worth waiting for."""
    retries = asked.rules.retries[model]
    return retries if last else replace(retries, wait_s=0.0)


def _only(selection: Selection, able: Collection[str], asked: Asked) -> Selection:
    """The selection without the models that cannot do this; the reason where none is left."""
    models = tuple(name for name in selection.models if name in able)
    if not models:
        assert asked.unsupported is not None, "there is no other reason for a choice"
        raise asked.unsupported
    return replace(selection, models=models)


def job_id(answer_id: str, number: int, of: int) -> str:
    """Of an answer's prompts, each its own request."""
    return answer_id if of == 1 else f"{answer_id}/{number}"


async def _replayed(chunks: list[Chunk]) -> AsyncGenerator[list[Chunk], None]:
    yield chunks


def check_limits(config: GatewayConfig, kind: Kind, request: Request) -> None:
    """Counts that no model needs to be known for; InvalidRequest."""
    limits = config.limits
    if request.prompt_count * request.choices > limits.max_choices:
        raise InvalidRequest(
            f"{request.prompt_count} prompts x n={request.choices} are more than {limits.max_choices} choices",
            param="n" if request.choices > 1 else kind.param,
        )
    if isinstance(request, ChatRequest) and len(request.messages) > limits.max_messages:
        raise InvalidRequest(f"messages: {len(request.messages)} are more than {limits.max_messages}", param="messages")
