"""What is asked: prompts of wanted lengths, conversations, documents, files, traces. Deterministic by seed and index.

Nothing here knows a tokenizer. Texts are made of common English words that are one token each in the vocabularies of
current models (checked with that of SmolLM2), so n words are n tokens; what the server counted stands beside
it in the results. Token ids instead of words (completions only) are exact for any server.

A conversation is a generator: it yields an Ask and is sent the answer's text, until it has nothing more to ask.
"""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from load.units import BadOption
from policies.traces import TraceRequest

Message = dict[str, str]

_WORDS = """
time year people way day man thing woman life child world school state family group hand part place case week system
work number night point home water room mother area money story fact month lot right study book eye job word issue
side kind head house friend father power hour game line end member law car city name team minute idea kid body back
parent face others level office door health person art war party result change reason girl moment air force foot boy
age policy music market sense nation plan death effect use class field role rate heart drug show leader light voice
wife mind price report son view town road arm value action season tax player record paper space ground form event
matter center site star table court oil cost figure street image phone data piece land doctor wall worker news test
movie north love step south west east summer winter spring river lake sea forest tree flower bird fish horse dog cat
bread milk sugar salt meat fruit green blue red white black brown large small long short high low old new good great
little own big early young few public same able other late hard major better strong whole free true full easy clear
recent open likely single wrong past fine common poor hot dead happy ready simple left often never always today almost
ever though while before after under during since until among above below
""".split()
_BY_BYTE = (_WORDS + _WORDS)[:256]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. prompt: a text, token ids, or messages. prompt_tokens: our own count of what we put in."""

    prompt: str | list[int] | list[Message]
    prompt_tokens: int
    max_tokens: int | None
    think_s: float = 0.0  # to wait after the answer before it


Conversation = Generator[Ask, str, None]


class Workload(Protocol):
    """Must be picklable: every worker process has its own."""

    def conversation(self, index: int) -> Conversation: ...


@dataclass(frozen=True)
class Lengths:
    """A distribution of token counts: at least 1, and at most `most`."""

    kind: str
    a: float = 0.0
    b: float = 0.0
    values: tuple[int, ...] = ()
    text: str = ""

    def draw(self, rng: random.Random) -> int:
        match self.kind:
            case "fixed":
                drawn = self.a
            case "normal":
                drawn = rng.gauss(self.a, self.b)
            case "lognormal":
                drawn = self.a * rng.lognormvariate(0.0, self.b)
            case "uniform":
                drawn = rng.randint(int(self.a), int(self.b))
            case _:
                drawn = rng.choice(self.values)
        return max(1, min(round(drawn), 10_000_000))


def parse_lengths(text: str, option: str) -> Lengths:
    """`512`, `normal:MEAN,SD`, `lognormal:MEDIAN,SIGMA`, `uniform:LOW,HIGH`, `empirical:FILE` (a count a line)."""
    kind, _, rest = text.partition(":")
    if kind == "empirical":
        return Lengths(kind, values=_counts(Path(rest), option), text=text)
    try:
        if not rest:
            kind, numbers = "fixed", [float(int(kind))]
        else:
            numbers = [float(part) for part in rest.split(",")]
            if kind not in ("normal", "lognormal", "uniform") or len(numbers) != 2:
                raise ValueError
        if numbers[0] < 1 or (kind != "uniform" and len(numbers) == 2 and numbers[1] < 0):
            raise ValueError
        if kind == "uniform" and not 1 <= numbers[0] <= numbers[1]:
            raise ValueError
    except ValueError:
        raise BadOption(
            f"{option} {text!r}: write a number from 1, normal:MEAN,SD, lognormal:MEDIAN,SIGMA, uniform:LOW,HIGH or "
            "empirical:FILE"
        ) from None
    return Lengths(kind, numbers[0], numbers[1] if len(numbers) > 1 else 0.0, text=text)


def _counts(path: Path, option: str) -> tuple[int, ...]:
    found: list[int] = []
    for number, line in _lines(path, option):
        try:
            found.append(int(line))
            if found[-1] < 1:
                raise ValueError
        except ValueError:
            raise BadOption(f"{option}: {path}:{number}: {line.strip()!r} is not a whole number from 1") from None
    if not found:
        raise BadOption(f"{option}: {path} holds no number")
    return tuple(found)


def _lines(path: Path, option: str) -> Iterable[tuple[int, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadOption(f"{option}: cannot read {path}: {error}") from None
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


# ------------------------------------------------------------------------------------------------------------- contents


@dataclass(frozen=True)
class Contents:
    """Makes text or token ids. vocab 0 makes words; else ids from [256, vocab) for completions."""

    seed: int = 0
    vocab: int = 0

    def rng(self, stream: int, index: int) -> random.Random:
        return random.Random(((self.seed & 0xFFFFFFFF) << 160) | ((index & (1 << 152) - 1) << 8) | stream)

    def make(self, rng: random.Random, tokens: int) -> list[Any]:
        """`tokens` words or ids."""
        if self.vocab:
            span = self.vocab - 256
            return [256 + int(rng.random() * span) for _ in range(tokens)]
        return [_BY_BYTE[byte] for byte in rng.randbytes(tokens)]

    def join(self, parts: list[Any]) -> str | list[int]:
        return parts if self.vocab else " ".join(parts)


# The streams of random numbers, so that one use does not disturb another.
_PROMPT, _PREFIX, _BLOCK, _DOCUMENT = range(4)


@dataclass(frozen=True)
class Synthetic:
    """Independent prompts; `prefix_tokens` more in front, the same for every request of one of `groups`."""

    contents: Contents
    prompt: Lengths
    output: Lengths
    prefix_tokens: int = 0
    groups: int = 1

    def conversation(self, index: int) -> Conversation:
        rng = self.contents.rng(_PROMPT, index)
        prompt, output = self.prompt.draw(rng), self.output.draw(rng)
        parts = []
        if self.prefix_tokens:
            parts = self.contents.make(self.contents.rng(_PREFIX, rng.randrange(self.groups)), self.prefix_tokens)
        parts = parts + self.contents.make(rng, prompt)
        yield Ask(self.contents.join(parts), len(parts), output)


@dataclass(frozen=True)
class Chat:
    """Sessions of several turns: a system prompt shared by a group, then question and the server's own answer in turn.

    The server's answers go back into the next turn's prompt, as a chat client sends them.
    """

    contents: Contents
    turns: Lengths
    prompt: Lengths
    output: Lengths
    prefix_tokens: int = 0
    groups: int = 1
    think_s: float = 0.0

    def conversation(self, index: int) -> Conversation:
        rng = self.contents.rng(_PROMPT, index)
        words = Contents(self.contents.seed)
        messages: list[Message] = []
        known = 0
        if self.prefix_tokens:
            prefix = words.make(words.rng(_PREFIX, rng.randrange(self.groups)), self.prefix_tokens)
            messages.append({"role": "system", "content": " ".join(prefix)})
            known = self.prefix_tokens
        for turn in range(self.turns.draw(rng)):
            prompt, output = self.prompt.draw(rng), self.output.draw(rng)
            messages.append({"role": "user", "content": " ".join(words.make(rng, prompt))})
            known += prompt
            answer = yield Ask(list(messages), known, output, self.think_s if turn else 0.0)
            messages.append({"role": "assistant", "content": answer})
            known += output


@dataclass(frozen=True)
class Documents:
    """Questions about one of `count` documents; a document stands before its question, so it can be cached."""

    contents: Contents
    count: int
    document: Lengths
    question: Lengths
    output: Lengths

    def conversation(self, index: int) -> Conversation:
        rng = self.contents.rng(_PROMPT, index)
        which = self.contents.rng(_DOCUMENT, rng.randrange(self.count))
        question, output = self.question.draw(rng), self.output.draw(rng)
        parts = self.contents.make(which, self.document.draw(which)) + self.contents.make(rng, question)
        yield Ask(self.contents.join(parts), len(parts), output)


@dataclass(frozen=True)
class PromptFile:
    """Prompts from a file, in turn, from the beginning again when they are used up."""

    entries: tuple[Ask, ...]

    def conversation(self, index: int) -> Conversation:
        yield self.entries[index % len(self.entries)]


def read_prompts(path: Path, output: Lengths | None) -> PromptFile:
    """`.jsonl`: an object a line with "prompt" or "messages", perhaps "max_tokens"; else a prompt a line.

    Raises BadOption naming the line.
    """
    entries = []
    rng = random.Random(0)
    for number, line in _lines(path, "--prompts"):
        record: Any = {"prompt": line}
        if path.suffix == ".jsonl":
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadOption(f"--prompts: {path}:{number}: not JSON: {error}") from None
        fault = _fault(record)
        if fault:
            raise BadOption(f"--prompts: {path}:{number}: {fault}")
        prompt = record.get("messages") or record["prompt"]
        words = prompt if isinstance(prompt, str) else " ".join(str(message["content"]) for message in prompt)
        limit = record.get("max_tokens") or (output.draw(rng) if output else None)
        entries.append(Ask(prompt, len(words.split()), limit))
    if not entries:
        raise BadOption(f"--prompts: {path} holds no prompt")
    return PromptFile(tuple(entries))


def _fault(record: Any) -> str:
    """What is wrong with a line of a prompt file; "" if nothing is."""
    if not isinstance(record, dict) or not (record.get("prompt") or record.get("messages")):
        return 'not an object with "prompt" or "messages"'
    messages, limit = record.get("messages"), record.get("max_tokens")
    if messages is not None and not (
        isinstance(messages, list) and all(isinstance(one, dict) and "content" in one for one in messages)
    ):
        return "messages must be a list of objects with role and content"
    if messages is None and not isinstance(record["prompt"], str):
        return "prompt must be a text"
    if limit is not None and not (type(limit) is int and limit > 0):
        return f"max_tokens must be a whole number from 1, got {limit!r}"
    return ""


_KEPT_BLOCKS = 20_000


@dataclass
class Replay:
    """A trace's requests: those that begin with the same block ids get the same first words, block by block."""

    contents: Contents
    requests: tuple[TraceRequest, ...]
    _blocks: OrderedDict[int, list[Any]] = field(default_factory=OrderedDict, repr=False)

    def conversation(self, index: int) -> Conversation:
        request = self.requests[index % len(self.requests)]
        parts: list[Any] = []
        for block in request.prefix_ids:
            if len(parts) >= request.prompt_tokens:
                break
            parts += self._block(block, request.block_tokens)
        del parts[request.prompt_tokens :]
        if len(parts) < request.prompt_tokens:  # contents unknown to the trace: nobody else's
            parts += self.contents.make(self.contents.rng(_PROMPT, index), request.prompt_tokens - len(parts))
        yield Ask(self.contents.join(parts), len(parts), max(1, request.output_tokens))

    def _block(self, block: int, tokens: int) -> list[Any]:
        found = self._blocks.get(block)
        if found is None or len(found) != tokens:
            found = self._blocks[block] = self.contents.make(self.contents.rng(_BLOCK, block), tokens)
            if len(self._blocks) > _KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        return found


def shared_blocks(requests: Iterable[TraceRequest]) -> float:
    """Share of the trace's blocks that an infinite prefix cache would have had: the truth that a replay is held to."""
    seen: set[int] = set()
    hits = total = 0
    for request in requests:
        fresh = next((at for at, one in enumerate(request.prefix_ids) if one not in seen), len(request.prefix_ids))
        hits, total = hits + fresh, total + len(request.prefix_ids)
        seen.update(request.prefix_ids)
    return hits / total if total else 0.0
