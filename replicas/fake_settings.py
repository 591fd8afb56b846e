"""What a fake engine is told, and what it says of itself. Needs no model, no network and no torch."""

from __future__ import annotations

from dataclasses import dataclass

from replicas.engine.waiting import FAIR_RESERVE, MAX_WAITING, PRIORITY_AGING_S, LineLimits
from replicas.fake_text import CHAT_TEMPLATE, END_OF_TEXT, TURN_END, byte_tokenizer
from replicas.protocol import ModelCard


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeSettings:
    """A fleet file's `engine_settings` when `engine: fake`. Rates of 0 mean as fast as possible.

    tokens_per_s: of each choice. prefill_tokens_per_s: of the whole engine.
    max_num_seqs: choices that run at once. max_waiting, max_waiting_tokens, max_waiting_per_key, priority_aging_s and
    fair_reserve are those of EngineConfig.
    reply_tokens: a choice ends by itself ("stop") after so many tokens; None lets it run to max_tokens.
    fail_after_tokens: a request that has brought so many tokens ends in an EngineFault.
    raise_after_tokens: then `step` itself raises. hang_after_tokens: then `step` does not return.
    crash_after_tokens: then the process dies as by kill -9. refuse_as_full: every `add` raises QueueFull.
    start_delay_s: the constructor takes so long. logprob: what every token is said to have; None refuses logprobs.
    multibyte: the text has characters of several bytes, which come with the last of their tokens.
    tally: a file to which the request's id is appended with every token that is made, for recounts; "" for none.
    """

    tokens_per_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    max_num_seqs: int = 256
    max_waiting: int = MAX_WAITING
    max_waiting_tokens: int | None = None
    max_waiting_per_key: int | None = None
    priority_aging_s: float | None = PRIORITY_AGING_S
    fair_reserve: float = FAIR_RESERVE
    num_blocks: int = 65536
    block_size: int = 16
    max_model_len: int = 8192
    reply_tokens: int | None = None
    fail_after_tokens: int | None = None
    raise_after_tokens: int | None = None
    hang_after_tokens: int | None = None
    crash_after_tokens: int | None = None
    refuse_as_full: bool = False
    start_delay_s: float = 0.0
    logprob: float | None = None
    multibyte: bool = False
    tally: str = ""

    @property
    def line_limits(self) -> LineLimits:
        return LineLimits(
            max_waiting=self.max_waiting,
            max_waiting_tokens=self.max_waiting_tokens,
            max_waiting_per_key=self.max_waiting_per_key,
            priority_aging_s=self.priority_aging_s,
            fair_reserve=self.fair_reserve,
        )


def fake_card(settings: FakeSettings, model: str = "fake", default_max_tokens: int = 0) -> ModelCard:
    """Of the tokenizer of bytes."""
    tokenizer = byte_tokenizer()
    return ModelCard(
        model=model,
        revision="fake-1",
        max_model_len=settings.max_model_len,
        vocab_size=tokenizer.get_vocab_size(),
        block_size=settings.block_size,
        tokenizer_json=tokenizer.to_str().encode(),
        chat_template=CHAT_TEMPLATE,
        special_tokens={"bos_token": END_OF_TEXT, "eos_token": TURN_END, "pad_token": END_OF_TEXT},
        eos_token_ids=tuple(tokenizer.get_vocab()[text] for text in (TURN_END, END_OF_TEXT)),
        default_max_tokens=default_max_tokens,
    )
