"""The decoder's logits against transformers' and the oracle's, on tiny random models of every supported kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from replicas.engine.attention import LayerCache, TorchAttention, choose_attention
from replicas.engine.batch import StepBatch
from replicas.engine.config import EngineConfig
from replicas.engine.model import Decoder
from replicas.engine.native.ops import NativeOps
from replicas.engine.native.paged import NativeAttention
from replicas.engine.ops import TorchOps, choose_ops
from replicas.engine.reference import Reference
from replicas.engine.weights import open_checkpoint
from replicas.protocol import ConfigError
from tests.engine.native_builds import kernels, needs_compiler
from tests.engine.random_models import MODELS, SHAPE, save_model

BLOCK_SIZE = 4
Save = Callable[..., tuple[Any, Path]]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """save(kind, **overrides) -> (transformers model, folder it is saved in), every weight and bias random."""

    def make(kind: str, *, folder: str = "model", **settings: Any) -> tuple[Any, Path]:
        return save_model(tmp_path / folder, kind, **settings), tmp_path / folder

    return make


def load(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Decoder:
    config = EngineConfig(model=str(folder), **settings)
    return Decoder.load(config, TorchOps(), TorchAttention(), torch.device("cpu"), dtype)


def load_as_served(folder: Path) -> Decoder:
    """With the operations and the attention that an engine on this CPU would choose."""
    device, dtype = torch.device("cpu"), torch.float32
    config = EngineConfig(model=str(folder))
    head_dim = open_checkpoint(folder).config.head_dim
    return Decoder.load(
        config, choose_ops(device, dtype), choose_attention("auto", device, dtype, head_dim), device, dtype
    )


class Paged:
    """Feeds a decoder pieces of sequences over a paged cache whose blocks are dealt in random order."""

    def __init__(self, decoder: Decoder, num_sequences: int, num_blocks: int = 64) -> None:
        self.decoder = decoder
        shape = (num_blocks, BLOCK_SIZE, decoder.num_kv_heads, decoder.head_dim)
        self.caches = [
            LayerCache(torch.full(shape, torch.nan), torch.full(shape, torch.nan)) for _ in range(decoder.num_layers)
        ]
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3))
        self.tables = order.view(num_sequences, -1)
        self.lens = [0] * num_sequences

    def step(self, pieces: Sequence[tuple[int, Sequence[int]]], rows: Sequence[int] | None = None) -> Tensor:
        """pieces: (sequence, its next tokens); logits of `rows`, by default of every token fed."""
        positions, slots, starts, lens = [], [], [0], []
        for index, tokens in pieces:
            begin, end = self.lens[index], self.lens[index] + len(tokens)
            for position in range(begin, end):
                positions.append(position)
                slots.append(int(self.tables[index, position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE)
            self.lens[index] = end
            starts.append(starts[-1] + len(tokens))
            lens.append(end)
        batch = StepBatch(
            token_ids=torch.tensor([token for _, tokens in pieces for token in tokens]),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            query_start=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor(lens, dtype=torch.int32),
            block_tables=self.tables[[index for index, _ in pieces]].int(),
            logits_rows=torch.tensor(range(len(positions)) if rows is None else rows, dtype=torch.int64),
            max_query_len=max(len(tokens) for _, tokens in pieces),
            max_context_len=max(lens),
        )
        return self.decoder.forward(batch, self.caches)


def tokens(length: int, seed: int = 0) -> list[int]:
    return torch.randint(SHAPE["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def hf_logits(model: Any, ids: Sequence[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([list(ids)])).logits[0]
    return logits


@pytest.mark.parametrize("kind", MODELS)
def test_logits_equal_transformers_and_the_oracle_in_one_piece_and_in_chunks(kind: str, save: Save) -> None:
    model, folder = save(kind)
    ids = tokens(41)
    expected = hf_logits(model, ids)
    assert expected.std() > 0.5, "logits so flat that any bug would pass"
    torch.testing.assert_close(Reference.load(folder).logits(ids), expected, atol=1e-4, rtol=1e-4)
    for decoder in (load(folder), load_as_served(folder)):
        whole = Paged(decoder, 1).step([(0, ids)])
        torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)
        paged = Paged(decoder, 1)
        pieces = [paged.step([(0, ids[begin:end])]) for begin, end in ((0, 5), (5, 6), (6, 23), (23, 24), (24, 41))]
        torch.testing.assert_close(torch.cat(pieces), expected, atol=1e-4, rtol=1e-4)


class OneCallEach(NativeOps):
    name = "native kernels, one call each"  # a name that `choose_stack` does not take for a native stack


@needs_compiler
@pytest.mark.parametrize("kind", MODELS)
def test_one_call_for_all_layers_gives_the_bits_of_one_call_each(kind: str, save: Save) -> None:
    _, folder = save(kind)
    config, cpu, attention = EngineConfig(model=str(folder)), torch.device("cpu"), NativeAttention(kernels("native"))
    fused = Decoder.load(config, NativeOps(kernels("native")), attention, cpu, torch.float32)
    plain = Decoder.load(config, OneCallEach(kernels("native")), attention, cpu, torch.float32)
    assert type(fused.stack) is not type(plain.stack)
    pair = [Paged(decoder, 4) for decoder in (fused, plain)]
    a, b, c = tokens(20, 1), tokens(30, 2), tokens(9, 3)
    for pieces, rows in (
        ([(0, a[:19]), (2, b[:11])], []),
        ([(2, b[11:30]), (0, a[19:]), (3, c)], [18, 19, 28]),
        ([(3, [5]), (0, [6])], None),
    ):
        got, expected = (paged.step(pieces, rows) for paged in pair)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", ["llama 3 rope", "mistral window", "qwen3"])
def test_prefill_chunks_and_decodes_of_several_sequences_share_a_step(kind: str, save: Save) -> None:
    model, folder = save(kind)
    a, b, c = tokens(20, 1), tokens(30, 2), tokens(9, 3)
    paged = Paged(load(folder), 4)
    paged.step([(0, a[:19]), (2, b[:11])])
    mixed = paged.step([(2, b[11:30]), (0, a[19:]), (3, c)], rows=[18, 19, 28])
    expected = torch.stack([hf_logits(model, ids)[-1] for ids in (b, a, c)])
    torch.testing.assert_close(mixed, expected, atol=1e-4, rtol=1e-4)


def test_a_step_without_wanted_logits_still_fills_the_cache(save: Save) -> None:
    model, folder = save("llama")
    ids = tokens(12)
    paged = Paged(load(folder), 1)
    assert paged.step([(0, ids[:9])], rows=[]).shape == (0, SHAPE["vocab_size"])
    torch.testing.assert_close(paged.step([(0, ids[9:])]), hf_logits(model, ids)[9:], atol=1e-4, rtol=1e-4)


def test_two_decoders_of_different_models_take_turns_in_one_process(save: Save) -> None:
    (first, a), (second, b) = save("qwen3", folder="a"), save("mistral window", folder="b")
    ids = tokens(25)
    one, two = Paged(load(a), 1), Paged(load(b), 1)
    for begin, end in ((0, 10), (10, 25)):
        got_one, got_two = one.step([(0, ids[begin:end])]), two.step([(0, ids[begin:end])])
        torch.testing.assert_close(got_one, hf_logits(first, ids)[begin:end], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got_two, hf_logits(second, ids)[begin:end], atol=1e-4, rtol=1e-4)


def test_sharded_checkpoint_equals_the_single_file(save: Save) -> None:
    model, folder = save("llama", shard="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    ids = tokens(10)
    torch.testing.assert_close(Paged(load(folder), 1).step([(0, ids)]), hf_logits(model, ids), atol=1e-4, rtol=1e-4)


def test_bfloat16_weights_give_float32_logits_close_to_float32s(save: Save) -> None:
    model, folder = save("llama")
    ids = tokens(16)
    logits = Paged(load(folder, torch.bfloat16), 1).step([(0, ids)])
    assert logits.dtype == torch.float32
    error = (logits - hf_logits(model, ids)).abs().mean() / hf_logits(model, ids).std()
    assert 0 < error < 0.05


def test_the_oracle_generates_what_transformers_generates(save: Save) -> None:
    model, folder = save("qwen2 window", eos_token_id=None)
    prompt = tokens(11)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, 11:].tolist()
    assert Reference.load(folder).generate(prompt, 20) == expected


def test_the_oracle_stops_at_an_end_of_sequence_id_unless_told_not_to(save: Save) -> None:
    _, folder = save("llama", eos_token_id=None)
    free = Reference.load(folder).generate(tokens(5), 10)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [free[3], 96]}))
    stopping = Reference.load(folder)
    assert stopping.generate(tokens(5), 10) == free[: free.index(free[3]) + 1]
    assert stopping.generate(tokens(5), 10, ignore_eos=True) == free


def test_rope_written_by_transformers_4_means_the_same(save: Save) -> None:
    model, folder = save("llama 3 rope")
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    (folder / "config.json").write_text(json.dumps(config))
    ids = tokens(30)
    torch.testing.assert_close(Paged(load(folder), 1).step([(0, ids)]), hf_logits(model, ids), atol=1e-4, rtol=1e-4)


def test_sizes_for_memory_and_bench_count_every_weight_once(save: Save) -> None:
    model, folder = save("llama tied")
    decoder = load(folder, max_model_len=100)
    assert decoder.weight_bytes == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert (decoder.num_layers, decoder.num_kv_heads, decoder.head_dim) == (3, 2, 12)
    assert decoder.max_model_len == 100
    assert decoder.config.kv_bytes_per_token(2) == 3 * 2 * 2 * 12 * 2
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    products = sum(p.numel() for p in matrices) + 97 * 48
    assert decoder.flops_per_token() == 2 * products
    assert decoder.flops_per_token(10) - decoder.flops_per_token() == 3 * 4 * 48 * 10


def test_loading_leaves_the_number_of_threads_as_it_was(save: Save) -> None:
    _, folder = save("llama")
    before = torch.get_num_threads()
    load(folder)
    with pytest.raises(ConfigError):
        load(folder, max_model_len=129)
    assert torch.get_num_threads() == before


def test_a_longer_context_than_the_models_is_refused(save: Save) -> None:
    _, folder = save("llama")
    with pytest.raises(ConfigError, match=r"max_model_len 129 .* 128"):
        load(folder, max_model_len=129)
