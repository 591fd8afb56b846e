"""The default model itself, read here and read by transformers from the same GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.models import resolve
from replicas.engine.attention import TorchAttention
from replicas.engine.config import EngineConfig
from replicas.engine.model import Decoder
from replicas.engine.ops import TorchOps
from replicas.engine.reference import Reference
from replicas.engine.tokenizer import Tokenizer
from replicas.engine.weights import expected_tensors, open_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    (path,) = folder.glob("*.gguf")
    config = AutoConfig.from_pretrained(folder, gguf_file=path.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"], strict=False)
    model.tie_weights()
    return model


def prompt(folder: Path, question: str) -> list[int]:
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return Tokenizer.load(open_checkpoint(folder)).encode(text)


def test_every_weight_is_the_one_that_transformers_reads(folder: Path, theirs: Any) -> None:
    checkpoint, state = open_checkpoint(folder), theirs.state_dict()
    for name in expected_tensors(checkpoint.config):
        assert torch.equal(checkpoint.tensor(name), state[name]), name


def test_the_oracles_logits_and_greedy_text_are_transformers(folder: Path, theirs: Any) -> None:
    reference = Reference.load(folder)
    ids = prompt(folder, "What is the capital of France?")
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(reference.logits(ids), expected, atol=2e-3, rtol=1e-3)
    generated = theirs.generate(torch.tensor([ids]), max_new_tokens=7, do_sample=False, pad_token_id=2)[0, len(ids) :]
    ours = reference.generate(ids, 7)
    assert ours == generated.tolist()
    assert "Paris" in Tokenizer.load(open_checkpoint(folder)).decode(ours)


def test_the_pulled_tokenizer_splits_digits_one_by_one(folder: Path) -> None:
    tokenizer = Tokenizer.load(open_checkpoint(folder))
    assert [tokenizer.token_bytes(at) for at in tokenizer.encode("  2024")] == [b"  ", b"2", b"0", b"2", b"4"]
    assert "<|im_start|>" in tokenizer.chat_template
    assert tokenizer.vocab_size == open_checkpoint(folder).config.vocab_size


def test_the_decoder_holds_the_weights_once(folder: Path) -> None:
    config = EngineConfig(model=str(folder))
    decoder = Decoder.load(config, TorchOps(), TorchAttention(), torch.device("cpu"), torch.float32)
    assert decoder.weight_bytes == 4 * 134_515_008
    assert decoder.flops_per_token() == pytest.approx(0.27e9, rel=0.01)
