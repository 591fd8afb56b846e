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


@dataclass(frozen=True, slots=True)
class Sample:
    prompt: NDArray[np.int32]
    output: NDArray[np.int32]
    states: NDArray[np.float16]
    turn: int = 0


class Recorder:
    """A proposer that never guesses and keeps every state it is shown. `ended` gets a finished sequence's."""

    name, costs = "recorder", False

    def __init__(self, ended: Callable[[Sample], None]) -> None:
        self._ended = ended
        self._states: dict[Sequence, list[NDArray[np.float16]]] = {}

    def propose(self, sequences: Any, depth: int) -> list[Proposal]:
        return [Proposal()] * len(sequences)

    def observe(self, seq: Sequence, hidden: Tensor) -> None:
        self._states.setdefault(seq, []).append(hidden.half().cpu().numpy().copy())

    def forget(self, seq: Sequence) -> None:
        states = self._states.pop(seq, None)
        if states is not None and seq.finish_reason is not None and len(states) == seq.num_output - 1:
            tokens = np.array(seq.tokens, dtype=np.int32)
            prompt, output = tokens[: seq.num_prompt], tokens[seq.num_prompt :]
            self._ended(Sample(prompt, output, np.array(states), int(seq.request_id)))

    def check_integrity(self, running: Any) -> None:
        assert set(self._states) <= set(running), "states outlived their sequence"


def make_prompts(files: Seq[Path], frame: tuple[str, str], *, ask: bool) -> list[list[str]]:
    """One list a file, and `questions()` if `ask`.

    JSON lines have a "prompt" each, a user's message; of plain text questions are made, and some of its paragraphs are
    to be continued as they are. frame: what the model's chat template puts before and after a user's message; both ""
    if it has none.
    """
    start, end = frame
    asked = [[start + text + end for text in questions()]] if ask else []
    lists = asked + [_of_file(file, start, end) for file in files]
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
    model: str, prompts: list[list[str]], folder: Path, *, tokens: int, report: Callable[[int], None] = lambda _: None
) -> None:
    """Continue prompts until `folder` holds `tokens` of output; what it holds already counts. report(tokens so far).

    The lists take turns. Three of five prompts are continued greedily, the rest at temperature 0.7; when all of a list
    had their turn, they are drawn at 0.7 with other seeds.
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
    speculation = Speculation((Recorder(finished.append),), 1, adaptive=False)
    seats, longest = 32, min(_LONGEST, open_checkpoint(model).config.max_position_embeddings)
    engine = Engine(
        EngineConfig(model=model, max_num_seqs=seats, max_model_len=longest, kv_memory_gib=2.0), speculation=speculation
    )
    params = SamplingParams(max_tokens=min(160, longest // 2))
    turns = (i for i in itertools.count() if i not in done)
    while have + sum(len(s.output) for s in finished) < tokens:
        while engine.stats().num_requests_running + engine.stats().num_requests_waiting < seats:
            i = next(turns)
            own, at = prompts[i % len(prompts)], i // len(prompts)
            ids = engine.encode(own[at % len(own)])[: longest - params.max_tokens]
            greedy = at < len(own) and at % 5 < 3
            drawn = replace(params, temperature=0.0 if greedy else 0.7, seed=i)
            engine.add(GenerateRequest(request_id=str(i), prompt_token_ids=tuple(ids), sampling=drawn))
        for chunk in engine.step():
            if chunk.error is not None:
                raise chunk.error
        if len(finished) >= _SHARD:
            have += _write(folder, len(shards), finished)
            shards.append(folder)
            finished.clear()
            report(have)
    if finished:
        report(have + _write(folder, len(shards), finished))


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
