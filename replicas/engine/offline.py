"""Offline use: run a list of prompts through an engine and gather whole completions."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from replicas.protocol import (
    Chunk,
    FinishReason,
    GenerateRequest,
    InvalidRequest,
    SamplingParams,
    TokenLogprob,
    Usage,
)

if TYPE_CHECKING:
    from replicas.engine.engine import Engine

_ids = count()


@dataclass(slots=True)
class Output:
    """One choice: its text, its tokens (the one that ended it included) and why it ended."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class Completion:
    """One prompt and its n outputs."""

    prompt_token_ids: list[int]
    outputs: list[Output]
    usage: Usage | None = None

    def take(self, chunk: Chunk) -> None:
        output = self.outputs[chunk.index]
        output.text += chunk.text
        output.token_ids += chunk.token_ids
        output.logprobs += chunk.logprobs
        output.finish_reason = chunk.finish_reason or output.finish_reason
        self.usage = chunk.usage or self.usage


def collect(
    engine: Engine, prompts: list[list[int]], sampling: SamplingParams | Seq[SamplingParams]
) -> list[Completion]:
    """See Engine.generate. The engine must be idle: chunks of other requests would have nobody to go to."""
    each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
    if len(each) != len(prompts):
        raise InvalidRequest(f"{len(prompts)} prompts but {len(each)} sampling params", param="sampling")
    assert not engine.has_work(), "generate() was called on an engine that serves other requests"
    requests = [
        GenerateRequest(request_id=f"offline-{next(_ids)}", prompt_token_ids=tuple(prompt), sampling=params)
        for prompt, params in zip(prompts, each, strict=True)
    ]
    for request in requests:
        engine.check(request)
    done = {
        r.request_id: Completion(list(r.prompt_token_ids), [Output() for _ in range(r.sampling.n)]) for r in requests
    }
    queue = deque(requests)
    try:
        while queue or engine.has_work():
            while queue and not engine.queue_full():  # the rest follow as the engine's own queue drains
                engine.add(queue.popleft())
            for chunk in engine.step():
                if chunk.error is not None:
                    raise chunk.error
                done[chunk.request_id].take(chunk)
    finally:
        for request in requests:  # after an error or Ctrl-C; finished ones are unknown to the engine already
            engine.abort(request.request_id)
    return list(done.values())
