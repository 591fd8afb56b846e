"""The score table a predictor is trained from, and the prices; every error names the file's line or the model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from replicas.protocol import ConfigError

Floats = NDArray[np.float64]


class TableError(ConfigError):
    """A score table or price list that cannot be used; the message names the file and the line or the model."""


@dataclass(frozen=True, slots=True)
class Price:
    """USD per million tokens."""

    input: float
    output: float


@dataclass(frozen=True)
class ScoreTable:
    """`scores[i, j]` in 0..1 is how well model j answered prompt i.

    `tasks` only says which prompts belong together when an evaluation leaves some out; no predictor ever sees it.
    """

    prompts: tuple[str, ...]
    models: tuple[str, ...]
    scores: Floats
    tasks: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: Iterable[int]) -> ScoreTable:
        rows = [int(row) for row in rows]
        return ScoreTable(
            tuple(self.prompts[row] for row in rows),
            self.models,
            self.scores[rows],
            tuple(self.tasks[row] for row in rows),
        )


def prompt_hash(prompt: str) -> str:
    """blake2b-64 of the prompt without outer white space: to notice a prompt again without keeping its text."""
    return blake2b(prompt.strip().encode("utf-8", "replace"), digest_size=8).hexdigest()


def read_scores(path: Path) -> ScoreTable:
    """Read JSON lines of {"prompt": str, "scores": {model: 0..1}, "task"?: str}; every line scores the same models."""
    prompts: list[str] = []
    tasks: list[str] = []
    scores: list[list[float]] = []
    models: tuple[str, ...] = ()
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        row = _row(line, where)
        if not models:
            models = tuple(sorted(row["scores"]))
        if set(row["scores"]) != set(models):
            odd = sorted(set(row["scores"]) ^ set(models))
            raise TableError(f"{where}: every line must score the same models; {odd[0]!r} is not on every line")
        prompts.append(row["prompt"])
        tasks.append(str(row.get("task", "")))
        scores.append([_score(row["scores"][model], model, where) for model in models])
    if not prompts:
        raise TableError(f"{path.name}: no prompt in the table")
    return ScoreTable(tuple(prompts), models, np.array(scores, dtype=np.float64), tuple(tasks))


def read_prices(path: Path) -> dict[str, Price]:
    """Read {model: {"input_price": USD per million tokens, "output_price": …}}; other keys are of no concern here."""
    try:
        document = json.loads("".join(_lines(path)))
    except json.JSONDecodeError as error:
        raise TableError(f"{path.name}, line {error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(document, dict) or not document:
        raise TableError(f"{path.name}: expected an object of model names")
    return {name: _price(entry, f"{path.name}: model {name!r}") for name, entry in document.items()}


def prices_for(models: Sequence[str], prices: Mapping[str, Price]) -> list[Price]:
    for model in models:
        if model not in prices:
            raise TableError(f"the price list has no price for {model!r}, which the score table names")
    return [prices[model] for model in models]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_bytes().decode("utf-8").split("\n")
    except OSError as error:
        raise TableError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise TableError(f"{path.name}, line {line}: not UTF-8") from None


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise TableError(f"{where}: not JSON: {error.msg}") from None
    if not isinstance(row, dict):
        raise TableError(f"{where}: expected an object with 'prompt' and 'scores'")
    if not isinstance(row.get("prompt"), str):
        raise TableError(f"{where}: 'prompt' must be a string")
    if not isinstance(row.get("scores"), dict) or not row["scores"]:
        raise TableError(f"{where}: 'scores' must map model names to numbers")
    return row


def _score(value: object, model: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise TableError(f"{where}: the score of {model!r} must be a number from 0 to 1, got {value!r}")
    return float(value)


def _price(entry: object, where: str) -> Price:
    found = []
    for key in ("input_price", "output_price"):
        value = entry.get(key) if isinstance(entry, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise TableError(f"{where}: {key!r} must be a number of USD per million tokens, got {value!r}")
        found.append(float(value))
    return Price(*found)
