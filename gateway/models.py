"""What the gateway makes of a ModelCard: the means to turn a request's words into tokens that fit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor

from gateway.requests import check_token_ids
from gateway.template import ChatTemplate
from gateway.tokenizer import Tokenizer
from replicas.protocol import ContextLengthExceeded, InvalidRequest, ModelCard


def item_path(param: str, number: int, count: int) -> str:
    """Where a caller finds prompt `number`: the field itself if it holds only one."""
    return param if count == 1 else f"{param}.{number}"


class Model:
    """A model that can be spoken for. Building one parses the tokenizer: up to a second for large vocabularies.

    `default_max_tokens` 0 means the rest of the context.
    """

    def __init__(self, name: str, card: ModelCard, default_max_tokens: int, threads: Executor) -> None:
        self.name = name
        self.card = card
        self.fingerprint = f"fp_{hashlib.blake2s(card.revision.encode(), digest_size=5).hexdigest()}"
        self._default_max_tokens = default_max_tokens or card.default_max_tokens
        self._tokenizer = Tokenizer(card, threads)
        self._template = ChatTemplate(card.chat_template, card.special_tokens)

    async def encode_chat(self, messages: Sequence[Mapping[str, str]], tenant: str) -> tuple[int, ...]:
        ids = await self._tokenizer.encode_chat(self._template.render(messages), tenant)
        if not ids:
            raise InvalidRequest("messages must not be empty", param="messages")
        return tuple(ids)

    async def encode_prompts(self, prompts: Sequence[str] | Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """Texts become tokens, token ids are used as they are once they are known to be in the vocabulary."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        given = [prompt for prompt in prompts if not isinstance(prompt, str)]
        encoded = await self._tokenizer.encode_prompts(texts) if texts else given
        for number, ids in enumerate(encoded):
            param = item_path("prompt", number, len(prompts))
            if not ids:
                raise InvalidRequest(f"{param} must not be empty", param=param)
            if given:
                check_token_ids(ids, self.card.vocab_size, param)
        return [tuple(ids) for ids in encoded]

    def max_tokens(self, prompt_tokens: int, asked: int | None, param: str) -> int:
        """How many tokens may be generated; ContextLengthExceeded (both counts in its message) when they do not fit."""
        limit = self.card.max_model_len
        room = limit - prompt_tokens
        if room < 1 or (asked is not None and asked > room):
            completion = f" and {asked} for the completion, {prompt_tokens + asked} together" if asked else ""
            raise ContextLengthExceeded(
                f"this model's maximum context length is {limit} tokens, but the request has {prompt_tokens} tokens in "
                f"the {param}{completion}; shorten the {param} or ask for less",
                param=param,
            )
        if asked is not None:
            return asked
        return min(self._default_max_tokens or room, room)
