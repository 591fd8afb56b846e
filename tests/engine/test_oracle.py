"""Greedy output of the default model equals transformers' `generate` on the same fp32 weights, token for token.

50 prompts of many kinds and lengths, 64 tokens each. A difference counts as a tie only where the reference's two best
logits are closer than 1e-3, and at most one prompt of the 50 may have one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from replicas.engine import Engine, EngineConfig, SamplingParams
from replicas.protocol import GenerateRequest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TOKENS = 64
GREEDY = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain how a bicycle stays upright.",
    "def fibonacci(n):",
    "Translate 'good morning' into Spanish, German and Japanese.",
    "3 + 4 * 2 =",
    "Once upon a time, in a village by the river,",
    "List five uses of a paper clip.",
    "Warum ist der Himmel blau?",
    "请用一句话介绍北京。",
    "SELECT name FROM users WHERE",
    "🙂🙂🙂 what do these mean?",
    "The quick brown fox",
    "import numpy as np\n\n\nclass Matrix:\n    def __init__(self",
    "Summarise: The mitochondrion is the powerhouse of the cell. It makes ATP.",
    "a",
    "To be, or not to be",
]
CONTEXT = (
    "You are a careful assistant. Answer in the user's language, briefly, and say so when you are not sure. "
    "Do not invent sources. Use metric units. Format code in fenced blocks. "
)


def prompts_of(encode: Callable[[str], list[int]]) -> list[list[int]]:
    """17 questions bare, in chat form, and after a shared context of varying length: 51 prompts of 1 to 200 tokens."""
    chats = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in QUESTIONS]
    shared = [CONTEXT * (i % 5 + 1) + question for i, question in enumerate(QUESTIONS)]
    return [encode(text) for text in (*QUESTIONS, *chats, *shared)]


class Oracle:
    """transformers' model on the same GGUF and what its `generate` says to each prompt."""

    def __init__(self, gguf: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        self.model.eval()

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        """Greedy, in batches of prompts of the same length class, left-padded and masked."""
        outputs: dict[int, list[int]] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), 8):
            part = order[start : start + 8]
            width = max(len(prompts[i]) for i in part)
            ids = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in part])
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in part])
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=TOKENS, min_new_tokens=TOKENS,
                do_sample=False, pad_token_id=0, eos_token_id=None, use_cache=True,
            )  # fmt: skip
            outputs.update(zip(part, out[:, width:].tolist(), strict=True))
        return [outputs[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def gap(self, prompt: list[int]) -> float:
        """How far the best logit after `prompt` is ahead of the second."""
        best, second = self.model(torch.tensor([prompt])).logits[0, -1].topk(2).values.tolist()
        return float(best - second)


@pytest.fixture(scope="module")
def gguf(default_model: Path) -> Path:
    [file] = default_model.glob("*.gguf")
    return file


@pytest.fixture(scope="module")
def oracle(gguf: Path) -> Oracle:
    return Oracle(gguf)


@pytest.fixture(scope="module")
def engine(gguf: Path) -> Engine:
    return Engine(EngineConfig(model=str(gguf), num_blocks=2048, max_model_len=1024))


@pytest.fixture(scope="module")
def prompts(engine: Engine) -> list[list[int]]:
    return prompts_of(engine.encode)


@pytest.fixture(scope="module")
def expected(oracle: Oracle, prompts: list[list[int]]) -> list[list[int]]:
    return oracle.generate(prompts)


def assert_same(oracle: Oracle, prompts: list[list[int]], expected: list[list[int]], got: list[list[int]]) -> None:
    ties = 0
    for prompt, want, have in zip(prompts, expected, got, strict=True):
        assert len(have) == TOKENS
        if want != have:
            at = next(i for i in range(TOKENS) if want[i] != have[i])
            gap = oracle.gap(prompt + want[:at])
            assert gap < 1e-3, f"token {at} is {have[at]}, not {want[at]}; the reference's gap is {gap:.4f}"
            ties += 1
    assert ties <= 1, f"{ties} ties"


def run(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    completions = engine.generate(prompts, GREEDY)
    engine.check_integrity()
    assert engine.pool.num_free == engine.pool.num_blocks
    return [completion.outputs[0].token_ids for completion in completions]


def test_alone(oracle: Oracle, engine: Engine, prompts: list[list[int]], expected: list[list[int]]) -> None:
    engine.pool.clear_cache()
    assert_same(oracle, prompts, expected, [run(engine, [prompt])[0] for prompt in prompts])


def test_mixed_in_one_batch_then_again_from_the_cache(
    oracle: Oracle, engine: Engine, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    engine.pool.clear_cache()
    assert_same(oracle, prompts, expected, run(engine, prompts))
    hits = engine.stats().prefix_cache_hits
    assert_same(oracle, prompts, expected, run(engine, prompts))
    assert engine.stats().prefix_cache_hits > hits + 1000


def test_decodes_padded_to_buckets_as_graphs_have_them(
    oracle: Oracle, gguf: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    engine = Engine(EngineConfig(model=str(gguf), num_blocks=2048, max_model_len=1024, step_graphs="eager"))
    assert_same(oracle, prompts, expected, run(engine, prompts))
    assert engine._graphs is not None
    assert engine._graphs.replays > TOKENS // 2  # the others were prompts, or both


def test_chunked_prefill_preemption_and_random_arrivals(
    oracle: Oracle, gguf: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """40 blocks in all, 24 tokens a step, arrivals in random order and at random steps."""
    engine = Engine(
        EngineConfig(model=str(gguf), num_blocks=40, max_model_len=640, max_num_batched_tokens=24, watermark=0.0)
    )
    rng = random.Random(0)
    arrivals = rng.sample(range(len(prompts)), len(prompts))
    got: dict[int, list[int]] = {i: [] for i in arrivals}
    while arrivals or engine.has_work():
        while arrivals and (rng.random() < 0.2 or not engine.has_work()):
            i = arrivals.pop()
            engine.add(GenerateRequest(request_id=str(i), prompt_token_ids=tuple(prompts[i]), sampling=GREEDY))
        for chunk in engine.step():
            got[int(chunk.request_id)] += chunk.token_ids
    engine.check_integrity()
    assert engine.stats().num_preemptions > 0
    assert_same(oracle, prompts, expected, [got[i] for i in range(len(prompts))])
