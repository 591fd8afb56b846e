"""What the fake engine says: a tokenizer of bytes, a chat template, and an endless deterministic text.

Needs no model, no network and no torch; `tokenizers` alone.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_WORDS = (
    "lorem ipsum dolor sit amet consectetur adipiscing elit sed do eiusmod tempor incididunt ut labore et dolore magna "
    "aliqua enim ad minim veniam quis nostrud exercitation ullamco laboris nisi aliquip ex ea commodo consequat duis "
    "aute irure dolor in reprehenderit voluptate velit esse cillum eu fugiat nulla pariatur excepteur sint occaecat "
    "cupidatat non proident sunt culpa qui officia deserunt mollit anim id est laborum"
)
# Characters of two, three and four bytes, to show that streams tear none of them. Not said unless asked for: with a
# tokenizer of bytes, all but the last token of such a character bring no text, which a client that times a stream
# would take for a stall.
_MULTIBYTE_WORDS = " café naïve 東京 🚀"


def byte_tokenizer() -> Tokenizer:
    """One token per byte, its id the byte's value, and three special tokens after them."""
    tokenizer = Tokenizer(models.BPE(vocab={symbol: byte for byte, symbol in enumerate(_byte_symbols())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (END_OF_TEXT, TURN_START, TURN_END)])
    return tokenizer


def _byte_symbols() -> list[str]:
    """Every byte's printable stand-in in byte-level BPE (GPT-2's convention): chr(256 + k) for the k-th awkward one."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    awkward = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) if byte in plain else chr(256 + awkward.index(byte)) for byte in range(256)]


@dataclass(frozen=True, slots=True)
class Script:
    """A text as tokens, read in a circle. `starts`: positions where a reader may begin, always whole characters."""

    token_ids: tuple[int, ...]
    pieces: tuple[bytes, ...]
    starts: tuple[int, ...]

    def start(self, prompt: Sequence[int], salt: tuple[int, ...]) -> int:
        """Where the continuation of `prompt` begins: a function of its arguments alone, on every machine."""
        digest = blake2b(struct.pack(f"<{len(prompt)}i", *prompt) + repr(salt).encode(), digest_size=8).digest()
        return self.starts[int.from_bytes(digest, "little") % len(self.starts)]


def script(tokenizer: Tokenizer, *, multibyte: bool = False) -> Script:
    """The words as `tokenizer` cuts them, with what each token adds to the text. multibyte: see `FakeSettings`."""
    words = _WORDS + (_MULTIBYTE_WORDS if multibyte else "")
    ids = tokenizer.encode(words + " ", add_special_tokens=False).ids
    ends = [len(_decoded(tokenizer, ids[: i + 1])) for i in range(len(ids))]
    whole = _decoded(tokenizer, ids)
    pieces = tuple(whole[begin:end] for begin, end in zip([0, *ends], ends, strict=False))
    word_starts = (i for i in range(1, len(ids)) if pieces[i - 1].endswith(b" ") or pieces[i].startswith(b" "))
    return Script(tuple(ids), pieces, (0, *word_starts))


def _decoded(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    """UTF-8 of the whole characters; a torn one at the end counts with the token that completes it."""
    return tokenizer.decode(ids, skip_special_tokens=False).rstrip("\N{REPLACEMENT CHARACTER}").encode()
