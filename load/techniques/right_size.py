"""Right-size against always the large model, on a live fleet: predictor, gateway and choice are real, answers are not.

Quality is that of the score table: what the model that was chosen for a prompt scored on it. Three parts of the table
are kept apart: a predictor is trained on three fifths, the trade of quality against cost is chosen on one fifth, and
the rest is asked. Always-large is the best model of the dearest ones. Fake engines stand for the models, as much faster
as they are cheaper: latencies follow from that assumption, cost and quality do not.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from load.http1 import clock, parse_url
from load.instance import Instance
from load.live_client import Client, Reply, publish
from load.units import BadOption, LoadError

Json = dict[str, Any]

CALLERS, ANSWER = 16, 256
LARGE_TOKENS_PER_S = 128.0
_MODEL = """\
  - name: {name}
    engine: fake
    num_cpus: 0.1
    price: {{input: {input:g}, output: {output:g}}}
    engine_settings: {{prefill_tokens_per_s: {prefill:g}, tokens_per_s: {decode:g}}}
"""
_BUILT_IN = {"small": 0.1, "medium": 0.2, "large": 0.9}
_PROMPTS = (
    "What is the capital of Norway?",
    "Say hello in French.",
    "Name three fruits.",
    "Is 17 a prime number?",
    "Write a Python function that merges two sorted lists in place, and prove that it is linear.",
    "A train leaves at 9:40 and covers 312 km at 78 km/h, with a stop of 25 minutes. When does it arrive? Explain.",
    "Compare the monetary policies of the Federal Reserve and the ECB between 2010 and 2015 in four paragraphs.",
    "Derive the closed form of the Fibonacci numbers from their generating function.",
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt and what each model scores on it; empty where nobody knows."""

    prompt: str
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Table:
    """prices: USD per million tokens (input, output) by model, the large one last."""

    rows: tuple[Asked, ...]
    prices: Mapping[str, tuple[float, float]]

    @property
    def large(self) -> str:
        return list(self.prices)[-1]


def read_table(scores: Path, prices: Path) -> Table:
    """The best model at each price, by mean score on the part to train on. Raises BadOption."""
    try:
        # not splitlines: prompts hold separators that JSON may have in a string
        found = [json.loads(line) for line in scores.read_text(encoding="utf-8").split("\n") if line.strip()]
        rows = [Asked(str(row["prompt"]), {name: float(one) for name, one in row["scores"].items()}) for row in found]
        told = json.loads(prices.read_text(encoding="utf-8"))
        models = rows[0].scores
        priced = {name: (float(told[name]["input_price"]), float(told[name]["output_price"])) for name in models}
        random.Random(0).shuffle(rows)
        mean = {name: statistics.fmean(row.scores[name] for row in _parts(rows)[0]) for name in models}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, statistics.StatisticsError) as error:
        raise BadOption(
            f"--scores {scores} and --prices {prices} are no score table and its prices: {error!r}"
        ) from None
    chosen: dict[str, tuple[float, float]] = {}
    for price in sorted(set(priced.values()), key=sum):
        best = max((name for name in priced if priced[name] == price), key=mean.__getitem__)
        chosen[best] = price
    if len(chosen) < 2:
        raise BadOption(f"--prices {prices}: all models cost the same, there is nothing to choose")
    kept = [Asked(row.prompt, {name: row.scores[name] for name in chosen}) for row in rows]
    return Table(tuple(kept), chosen)


def built_in(number: int) -> Table:
    rows = [Asked(f"{_PROMPTS[i % len(_PROMPTS)]} (question {i})", {}) for i in range(number)]
    return Table(tuple(rows), {name: (price, price) for name, price in _BUILT_IN.items()})


def _parts(rows: Sequence[Asked]) -> tuple[Sequence[Asked], Sequence[Asked], Sequence[Asked]]:
    """To train on, to choose the trade on, to ask."""
    fifth = len(rows) // 5
    return rows[2 * fifth :], rows[:fifth], rows[fifth : 2 * fifth]


def fleet(prices: Mapping[str, tuple[float, float]]) -> str:
    dearest = max(map(sum, prices.values()))
    models = []
    for name, price in prices.items():
        speed = LARGE_TOKENS_PER_S * dearest / sum(price)
        models.append(_MODEL.format(name=name, input=price[0], output=price[1], prefill=40 * speed, decode=speed))
    return "models:\n" + "".join(models) + "gateway: {num_cpus: 0.25}\n"


def measure(scores: Path | None, prices: Path | None, turns: int, quick: bool, say: Callable[[str], None]) -> Json:
    """The row. LoadError where the fleet does not come up or does not answer."""
    each = 8 if quick else 60
    table = read_table(scores, prices) if scores and prices else built_in(each * turns)
    with Instance(fleet(table.prices)) as instance:
        right_size = _trained(instance, table) if scores else "{cost_weight: 0.5}"
        document = f"groups: {{auto: {{models: [{', '.join(table.prices)}], right_size: {right_size}}}}}"
        target, key = parse_url(instance.base_url), instance.key("techniques")
        asyncio.run(publish(target, instance.admin_token(), document + "\n", "load.techniques"))
        asked = _parts(table.rows)[2] if scores else table.rows
        found, answers = [], dict[str, list[tuple[Asked, str]]](off=[], on=[])
        for turn in range(turns):
            some, both = [asked[(turn * each + i) % len(asked)] for i in range(each)], {}
            for side, model in (("off", table.large), ("on", "auto")):
                replies, seconds = asyncio.run(_ask(target, key, model, some))
                both[side], who = _figures(replies, seconds, table)
                answers[side] += zip(some, who, strict=True)
                say(f"turn {turn + 1} {model}: {both[side]['usd_per_million']:.3f} USD per million tokens")
            found.append(both)
    origin = f"{scores.name}, unseen by the predictor" if scores else "8 built-in questions, numbered"
    return {
        "where": f"{len(table.prices)} fake models behind a live gateway, as much faster as they are cheaper (assumed)",
        "off": {"means": f"always {table.large}", "fleet": f"model: {table.large} (as callers ask)"},
        "on": {"means": "predicted quality against price" if scores else "rule of thumb, untrained", "fleet": document},
        "cases": [
            {"workload": f"{each} prompts of {origin}, {CALLERS} callers, answers of {ANSWER} tokens", "turns": found}
        ],
        "quality": _quality(answers, table) if scores else {"what": "none", "why": "not measured: give it --scores"},
    }


def _trained(instance: Instance, table: Table) -> str:
    """`right_size` of the policy document: the cheapest trade that is as good as the best model on the second part."""
    known, choosing, _ = _parts(table.rows)
    files = {"known": instance.home / "known.jsonl", "choosing": instance.home / "choosing.jsonl"}
    for name, rows in (("known", known), ("choosing", choosing)):
        lines = [json.dumps({"prompt": row.prompt, "scores": dict(row.scores)}) for row in rows]
        files[name].write_text("\n".join(lines) + "\n")
    prices, frontier = instance.home / "prices.json", instance.home / "frontier.json"
    named = {name: {"input_price": price[0], "output_price": price[1]} for name, price in table.prices.items()}
    prices.write_text(json.dumps(named))
    folder = instance.home / "predictors" / "table"
    instance.command("policy", "train", "--scores", f"{files['known']}", "--prices", f"{prices}", "--out", f"{folder}")
    rest = ("--prices", f"{prices}", "--model", f"{folder}", "--allow-overlap", "--json", f"{frontier}")
    instance.command("policy", "frontier", "--scores", f"{files['choosing']}", *rest)
    points = json.loads(frontier.read_text())["points"]
    good = [one for one in points if one["quality"] >= 1.0] or [max(points, key=lambda one: one["quality"])]
    weight = min(good, key=lambda one: one["relative_cost"])["setting"]["cost_weight"]
    digest = hashlib.sha256((folder / "predictor.json").read_bytes()).hexdigest()
    predictor = f'{{path: table, sha256: "{digest}"}}'
    return f"{{cost_weight: {weight:.6g}, expected_output_tokens: {ANSWER}, predictor: {predictor}}}"


async def _ask(origin: Any, key: str, model: str, some: Sequence[Asked]) -> tuple[list[Reply], float]:
    """The answers, whole, in the order of the prompts, and the seconds that they took."""
    free = asyncio.Semaphore(CALLERS)
    started = clock()

    async def one(client: Client, asked: Asked) -> Reply:
        async with free:
            messages = [{"role": "user", "content": asked.prompt}]
            fields = {"model": model, "messages": messages, "max_tokens": ANSWER, "ignore_eos": True}
            return await client.ask("POST", "/v1/chat/completions", fields)

    async with Client(origin, key) as client:
        replies = await asyncio.gather(*(one(client, asked) for asked in some))
    return list(replies), clock() - started


def _figures(replies: Sequence[Reply], seconds: float, table: Table) -> tuple[Json, list[str]]:
    """And who answered each. LoadError for an answer that is none."""
    who, usd, tokens, output = [], 0.0, 0, 0
    for reply in replies:
        if reply.complaint:
            raise LoadError(f"a request of right-size failed: {reply.complaint}")
        found = reply.fields()
        usage, price = found["usage"], table.prices[found["model"]]
        usd += (usage["prompt_tokens"] * price[0] + usage["completion_tokens"] * price[1]) / 1e6
        tokens += usage["prompt_tokens"] + usage["completion_tokens"]
        output += usage["completion_tokens"]
        who.append(str(found["model"]))
    e2e = np.percentile([reply.ended - reply.begun for reply in replies], (50, 95)).tolist()
    return {
        "tokens_per_s": output / seconds,
        "e2e_p50_s": e2e[0],
        "e2e_p95_s": e2e[1],
        "usd_per_million": usd / tokens * 1e6,
        "large_share": who.count(table.large) / len(who),
    }, who


def _quality(answers: Mapping[str, Sequence[tuple[Asked, str]]], table: Table) -> Json:
    """Mean scores of both sides, and the 95 % interval of their difference by prompt."""
    off, on = ([row.scores[model] for row, model in answers[side]] for side in ("off", "on"))
    differences = [b - a for a, b in zip(off, on, strict=True)]
    half = 1.96 * statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    change = statistics.fmean(differences)
    return {
        "what": "scores",
        "scores": [statistics.fmean(off), statistics.fmean(on)],
        "change": [change - half, change, change + half],
        "of": len(on),
        "answered_by": {name: sum(model == name for _, model in answers["on"]) for name in table.prices},
    }
