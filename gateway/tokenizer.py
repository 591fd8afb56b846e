"""Text to token ids, exactly as the model's own tokenizer would, and off the event loop when that takes long.

Encodings of long chats are kept by segment. A segment starts at a special token and ends before the next; those tokens
are cut out of the text before anything else looks at it, so the encoding of the whole is the concatenation of the
encodings of its segments, and a conversation that grows by a turn is encoded only where it is new.
"""

from __future__ import annotations

import asyncio
import json
import re
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Executor
from itertools import pairwise

from tokenizers import Tokenizer as HuggingFaceTokenizer

from replicas.protocol import ModelCard

# About 20 µs and 0.2 ms of the event loop; below the first the cache costs more than it brings.
_CACHE_FROM_CHARS = 2_000
_THREAD_FROM_CHARS = 8_000


class Segments:
    """Least recently used segments, bounded by the tokens they hold (4 bytes each, plus their text).

    Keyed by tenant too: the time an encoding takes must not tell one tenant what another one sent.
    """

    def __init__(self, max_tokens: int = 2_000_000) -> None:
        self._max_tokens = max_tokens
        self._tokens = 0
        self._entries: OrderedDict[tuple[str, bool, str], array[int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: tuple[str, bool, str]) -> array[int] | None:
        ids = self._entries.get(key)
        if ids is not None:
            self._entries.move_to_end(key)
        return ids

    def put(self, key: tuple[str, bool, str], ids: array[int]) -> None:
        if key in self._entries or len(ids) > self._max_tokens:
            return
        self._entries[key] = ids
        self._tokens += len(ids)
        while self._tokens > self._max_tokens:
            _, dropped = self._entries.popitem(last=False)
            self._tokens -= len(dropped)


class Tokenizer:
    """One model's tokenizer. `threads` runs long encodings; the library lets go of the interpreter meanwhile."""

    def __init__(self, card: ModelCard, threads: Executor) -> None:
        self._tokenizer = HuggingFaceTokenizer.from_buffer(card.tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._threads = threads
        self._segments = Segments()
        self._tokens, self._cut = _added_tokens(card.tokenizer_json)
        bos = card.special_tokens.get("bos_token")
        self._bos: int | None = self._tokenizer.token_to_id(bos) if bos else None
        self._add_bos = card.add_bos

    async def encode_prompts(self, texts: list[str]) -> list[array[int]]:
        """Plain prompts: the special tokens that the model expects around one are added, a BOS never twice."""
        if sum(map(len, texts)) < _THREAD_FROM_CHARS:
            encoded = self._encode(texts, True)
        else:
            encoded = await self._in_thread(texts, True)
        return encoded if self._bos is None else [self._with_one_bos(ids, self._bos) for ids in encoded]

    def _with_one_bos(self, ids: array[int], bos: int) -> array[int]:
        if ids[:2] == array("i", [bos, bos]):
            return ids[1:]
        if self._add_bos and ids[:1] != array("i", [bos]):
            return array("i", [bos]) + ids
        return ids

    async def encode_chat(self, text: str, tenant: str) -> Sequence[int]:
        """A rendered chat template, which holds all its special tokens already; nothing is added."""
        if len(text) < _CACHE_FROM_CHARS:
            return self._encode([text], False)[0]
        keys = [(tenant, index == 0, part) for index, part in enumerate(self._split(text))]
        known = {key: self._segments.get(key) for key in keys}
        missing = [key for key, ids in known.items() if ids is None]
        texts = [part for _, _, part in missing]
        if sum(map(len, texts)) < _THREAD_FROM_CHARS:
            fresh = self._encode(texts, False)
        else:
            fresh = await self._in_thread(texts, False)
        for key, ids in zip(missing, fresh, strict=True):
            known[key] = ids
            self._segments.put(key, ids)
        whole: array[int] = array("i")
        for key in keys:
            whole.extend(known[key] or ())
        return whole

    def _split(self, text: str) -> list[str]:
        cuts = [match.start() for match in self._tokens.finditer(text) if match[0] in self._cut]
        edges = [0, *(cut for cut in cuts if cut > 0), len(text)]
        return [text[start:end] for start, end in pairwise(edges)]

    def _encode(self, texts: list[str], special: bool) -> list[array[int]]:
        # encode_batch_fast, also for one text: encode() holds the interpreter lock, and this skips the offsets
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=special)
        return [array("i", encoding.ids) for encoding in encodings]

    async def _in_thread(self, texts: list[str], special: bool) -> list[array[int]]:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._encode, texts, special)


def _added_tokens(tokenizer_json: bytes) -> tuple[re.Pattern[str], frozenset[str]]:
    """A pattern of the tokens that are cut out of raw text, and those of them before which text may be cut.

    The longest alternative comes first and a match hides what begins inside it: the library's leftmost-longest search.
    No cut before a token that swallows white space on its left, and none at all where one needs word boundaries: both
    depend on the text before it. Tokens found only after normalization never end a segment.
    """
    added = json.loads(tokenizer_json).get("added_tokens") or ()
    raw = [token for token in added if token["content"] and not token["normalized"]]
    names = sorted((token["content"] for token in raw), key=len, reverse=True)
    if any(token["single_word"] for token in raw):
        names = []
    # (?!) matches nowhere: then there is one segment per text
    pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")
    return pattern, frozenset(token["content"] for token in raw if not token["lstrip"])
