"""What a model writes itself, with its last hidden states: from which heads and drafts learn (self-distillation).

Prompts are continued in one batch, and the results lie in shards that a later run takes up again:

    shard-00000.npz    prompts int32 [sum P], prompt_lengths [N], outputs int32 [sum M], output_lengths [N]
                       turns int64 [N]: which turn each was; those that were under way when a run ended are missing
                       states float16 [sum (M - 1), H]: states[i] of a sample is the last normed state before output i;
                       that of the last output is not kept, nothing follows it
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from replicas.engine.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.engine.sequence import Sequence
from replicas.engine.spec.proposer import Proposal
from replicas.engine.spec.questions import questions
from replicas.engine.spec.speculation import Speculation
from replicas.engine.weights import open_checkpoint
from replicas.protocol import ConfigError, GenerateRequest, SamplingParams

_SHARD = 64  # samples
_ABOUT_TEXTS = ("Summarize the following text:\n\n{}", "Explain the following in simple words:\n\n{}", "{}")
_LONGEST = 768  # tokens of a sample
_LONGEST_TEXT = 1500  # characters of a user's message
_LONGEST_QUESTION = 64  # tokens of a user's message that the model writes
_QUESTION = "question-"


@dataclass(frozen=True, slots=True)
class Sample:
    prompt: NDArray[np.int32]
    output: NDArray[np.int32]
    states: NDArray[np.float16]
    turn: int = 0


@dataclass(frozen=True, slots=True)
class OwnQuestions:
    """In place of a list of prompts: the model also writes the user's message, as Magpie does (Xu et al. 2024,
    arXiv:2406.08464). start, end: what its chat template puts before and after one."""

    start: str
    end: str


Prompts = list[str] | OwnQuestions


class Recorder:
    """A proposer that never guesses and keeps every state it is shown. `ended` gets a finished sequence's."""

    name, costs = "recorder", False

    def __init__(self, ended: Callable[[Sample], None]) -> None:
        self._ended = ended
        self._states: dict[Sequence, list[NDArray[np.float16]]] = {}

    def propose(self, sequences: Any, depth: int) -> list[Proposal]:
        return [Proposal()] * len(sequences)

    def observe(self, seq: Sequence, states: Tensor) -> None:
        self._states.setdefault(seq, []).extend(states.half().cpu().numpy().copy())

    def forget(self, seq: Sequence) -> None:
        states = self._states.pop(seq, None)
        wanted = seq.finish_reason is not None and not seq.request_id.startswith(_QUESTION)
        if states is not None and wanted and len(states) == seq.num_output - 1:
            tokens = np.array(seq.tokens, dtype=np.int32)
            prompt, output = tokens[: seq.num_prompt], tokens[seq.num_prompt :]
            self._ended(Sample(prompt, output, np.array(states), int(seq.request_id)))

    def check_integrity(self, running: Any) -> None:
        assert set(self._states) <= set(running), "states outlived their sequence"


def make_prompts(files: Seq[Path], frame: tuple[str, str], *, ask: bool) -> list[Prompts]:
    """One list a file, and if `ask` `questions()` and, of models with a chat template, twice as many of its own.

    JSON lines have a "prompt" each, a user's message; of plain text questions are made, and some of its paragraphs are
    to be continued as they are. frame: what the model's chat template puts before and after a user's message; both ""
    if it has none.
    """
    start, end = frame
    lists: list[Prompts] = [[start + text + end for text in questions()]] if ask else []
    if ask and start:
        lists += [OwnQuestions(start, end)] * 2
    lists += [_of_file(file, start, end) for file in files]
    if not lists:
        raise ConfigError("there is nothing to ask the model: give a --text or leave --no-questions out", param="text")
    return lists


def _of_file(file: Path, start: str, end: str) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {str(file)!r} cannot be read: {error}", param="text") from error
    if file.suffix == ".jsonl":
        try:
            asked = [str(json.loads(line)["prompt"]) for line in text.split("\n") if line.strip()]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f'{file.name}: every line must be a JSON object with "prompt": {error}') from error
        return [start + prompt[:_LONGEST_TEXT] + end for prompt in asked]
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n|\n(?= \S)", text) if len(part.strip()) > 80]
    if not paragraphs:
        raise ConfigError(f"{file.name} holds no paragraph of more than 80 characters")
    return [
        paragraph[:200]
        if i % 4 == 3 or not end
        else start + _ABOUT_TEXTS[i % 4].format(paragraph[:_LONGEST_TEXT]) + end
        for i, paragraph in enumerate(paragraphs)
    ]


def write_self_text(
    model: str, prompts: Seq[Prompts], folder: Path, *, tokens: int, report: Callable[[int], None] = lambda _: None
) -> None:
    """Continue prompts until `folder` holds `tokens` of output; what it holds already counts. report(tokens so far).

    The lists take turns. Three of five prompts are continued greedily, the rest at temperature 0.7; when all of a list
    had their turn, they are drawn at 0.7 with other seeds. Questions of the model's own are drawn at temperature 1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = sorted(folder.glob("shard-*.npz"))
    done, have = set[int](), 0
    for shard in shards:
        with np.load(shard) as held:
            done.update(held["turns"].tolist())
            have += int(held["output_lengths"].sum())
    report(have)
    if have >= tokens:
        return
    finished: list[Sample] = []
    writer = _Writer(model, prompts, (i for i in itertools.count() if i not in done), finished.append)
    while have + sum(len(s.output) for s in finished) < tokens:
        writer.step()
        if len(finished) >= _SHARD:
            have += _write(folder, len(shards), finished)
            shards.append(folder)
            finished.clear()
            report(have)
    if finished:
        report(have + _write(folder, len(shards), finished))


class _Writer:
    """An engine that is kept full with `turns` of `prompts`."""

    _SEATS = 32

    def __init__(
        self, model: str, prompts: Seq[Prompts], turns: Iterator[int], ended: Callable[[Sample], None]
    ) -> None:
        self._prompts, self._turns = prompts, turns
        self._longest = min(_LONGEST, open_checkpoint(model).config.max_position_embeddings)
        self._params = SamplingParams(max_tokens=min(160, self._longest // 2))
        self._asked: dict[str, str] = {}  # questions under way, as far as they are written
        config = EngineConfig(model=model, max_num_seqs=self._SEATS, max_model_len=self._longest, kv_memory_gib=2.0)
        self._engine = Engine(config, speculation=Speculation((Recorder(ended),), 1, adaptive=False))

    def step(self) -> None:
        stats = self._engine.stats()
        for _ in range(self._SEATS - stats.num_requests_running - stats.num_requests_waiting):
            self._begin(next(self._turns))
        for chunk in self._engine.step():
            if chunk.error is not None:
                raise chunk.error
            if chunk.request_id in self._asked:
                self._asked[chunk.request_id] += chunk.text
                if chunk.finish_reason is not None:
                    turn, text = int(chunk.request_id.removeprefix(_QUESTION)), self._asked.pop(chunk.request_id)
                    own = self._own(turn)
                    assert isinstance(own, OwnQuestions), "only a model's own question is written before it is asked"
                    self._ask(turn, own.start + text + own.end, greedy=self._round(turn) % 5 < 3)

    def _own(self, turn: int) -> Prompts:
        return self._prompts[turn % len(self._prompts)]

    def _round(self, turn: int) -> int:
        return turn // len(self._prompts)

    def _begin(self, turn: int) -> None:
        own, at = self._own(turn), self._round(turn)
        if isinstance(own, OwnQuestions):
            request_id = f"{_QUESTION}{turn}"
            self._asked[request_id] = ""
            most = min(_LONGEST_QUESTION, self._params.max_tokens)
            self._add(request_id, own.start, replace(self._params, temperature=1.0, seed=turn, max_tokens=most))
        else:
            self._ask(turn, own[at % len(own)], greedy=at < len(own) and at % 5 < 3)

    def _ask(self, turn: int, prompt: str, *, greedy: bool) -> None:
        self._add(str(turn), prompt, replace(self._params, temperature=0.0 if greedy else 0.7, seed=turn))

    def _add(self, request_id: str, prompt: str, params: SamplingParams) -> None:
        ids = tuple(self._engine.encode(prompt)[: self._longest - params.max_tokens])
        self._engine.add(GenerateRequest(request_id=request_id, prompt_token_ids=ids, sampling=params))


def _write(folder: Path, index: int, samples: list[Sample]) -> int:
    partial = folder / f"part-{index:05}.npz"
    np.savez(
        partial,
        prompts=np.concatenate([s.prompt for s in samples]),
        prompt_lengths=np.array([len(s.prompt) for s in samples]),
        outputs=np.concatenate([s.output for s in samples]),
        output_lengths=np.array([len(s.output) for s in samples]),
        turns=np.array([s.turn for s in samples]),
        states=np.concatenate([s.states for s in samples]),
    )
    partial.replace(folder / f"shard-{index:05}.npz")
    return sum(len(s.output) for s in samples)


def read_self_text(folder: Path) -> Iterator[Sample]:
    """All samples with at least two outputs; ConfigError if there are none."""
    found = False
    for file in sorted(folder.glob("shard-*.npz")):
        with np.load(file) as shard:
            prompts = np.split(shard["prompts"], shard["prompt_lengths"].cumsum()[:-1])
            outputs = np.split(shard["outputs"], shard["output_lengths"].cumsum()[:-1])
            states = np.split(shard["states"], (shard["output_lengths"] - 1).cumsum()[:-1])
        for sample in map(Sample, prompts, outputs, states):
            if len(sample.output) > 1:
                found = True
                yield sample
    if not found:
        raise ConfigError(f"{folder} holds no text of the model's own")


def frequent_tokens(samples: list[Sample], most: int) -> NDArray[np.int64]:
    """The token ids that were written most, in rising order."""
    counts = np.bincount(np.concatenate([s.output for s in samples]))
    order = np.argsort(-counts, kind="stable")[:most]
    return np.sort(order[counts[order] > 0]).astype(np.int64)
