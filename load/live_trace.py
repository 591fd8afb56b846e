"""A trace's traffic for several runs on one instance: the same requests, no token in common between runs.

A run that began with the caches of the one before would be measured on its predecessor's work. Every run has a salt of
its own, and a block's tokens are a hash of (salt, block id): prefixes are shared within a run exactly as the trace
shares them, and never between two. What a former run left in a cache is older than anything of this one, so it is
evicted first and all runs find the same room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from load.units import BadOption
from load.workload import Ask, Conversation
from policies.traces import TraceRequest, mean_rate, scaled


def segment(requests: Sequence[TraceRequest], rate: float, count: int) -> list[TraceRequest]:
    """The first `count` requests with their own gaps, stretched so that `rate` of them arrive a second."""
    chosen = requests[:count]
    if len(chosen) < 2 or chosen[-1].arrival_s <= chosen[0].arrival_s:
        raise BadOption("the part of the trace that fits into the time has no rate to scale: give it more --minutes")
    return scaled(chosen, rate_scale=rate / mean_rate(chosen))


@dataclass(frozen=True)
class SaltedTrace:
    """A load.workload.Workload: prompts as token ids below 256, which every byte-level vocabulary has."""

    requests: tuple[TraceRequest, ...]
    salt: str

    def conversation(self, index: int) -> Conversation:
        request = self.requests[index]
        prompt: list[int] = []
        for block in request.prefix_ids:
            prompt += self._tokens(f"block {block}", request.block_tokens)
        if len(prompt) < request.prompt_tokens:  # what the trace says nothing of is nobody else's
            prompt += self._tokens(f"request {index}", request.prompt_tokens - len(prompt))
        del prompt[request.prompt_tokens :]
        yield Ask(prompt, len(prompt), request.output_tokens)

    def _tokens(self, name: str, count: int) -> list[int]:
        parts = (blake2b(f"{self.salt}\0{name}\0{part}".encode()).digest() for part in range(-(-count // 64)))
        return list(b"".join(parts)[:count])
