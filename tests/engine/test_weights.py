"""Opening safetensors folders: what is missing, foreign, misshapen or broken is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from replicas.engine.model_config import config_from_hf
from replicas.engine.weights import expected_tensors, fingerprint, open_checkpoint
from replicas.protocol import ConfigError

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole, random checkpoint in one file."""
    path = tmp_path / "tiny"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in expected_tensors(config_from_hf(CONFIG)).items()}
    save_file(tensors, path / "model.safetensors")
    return path


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


def test_tensors_come_back_as_they_were_stored(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    stored = load_file(folder / "model.safetensors")
    assert set(stored) == set(expected_tensors(checkpoint.config))
    for name, tensor in stored.items():
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_half_precision_is_kept_for_the_loader_to_cast(folder: Path) -> None:
    rewrite(folder, **{NORM: torch.full((32,), 1.5, dtype=torch.bfloat16)})
    assert open_checkpoint(folder).tensor(NORM).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({NORM: None}, f"model.safetensors: tensor '{NORM}' is missing"),
        ({NORM: torch.ones(31)}, rf"model.safetensors: tensor '{NORM}' has shape \(31,\), expected \(32,\)"),
        ({"model.extra": torch.ones(1)}, "model.safetensors: tensor 'model.extra' is unexpected for LlamaForCausalLM"),
        ({NORM: torch.ones(32, dtype=torch.int8)}, f"model.safetensors: tensor '{NORM}' has the unsupported type I8"),
    ],
)
def test_missing_misshapen_foreign_and_integer_tensors_are_named(
    folder: Path, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    rewrite(folder, **changes)
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(folder)


def test_a_stored_copy_of_a_tied_head_and_old_rotary_tables_are_ignored(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": True}))
    rewrite(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert "lm_head.weight" not in expected_tensors(open_checkpoint(folder).config)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_named(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"model.safetensors is truncated or corrupt"):
        open_checkpoint(folder)


def test_garbage_instead_of_a_header_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])
    with pytest.raises(ConfigError, match=r"model.safetensors is truncated or corrupt"):
        open_checkpoint(folder)


def test_shards_are_found_by_the_index_and_a_lost_one_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"part-{position % 2}.safetensors" for position, name in enumerate(names)}
    for part in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == part}, folder / part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(folder)
    assert all(torch.equal(checkpoint.tensor(name), tensors[name]) for name in names)
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(
        ConfigError, match=r"part-1.safetensors is missing though model.safetensors.index.json names it"
    ):
        open_checkpoint(folder)


def test_a_tensor_that_no_shard_holds_is_named_with_the_files_searched(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    del tensors[NORM]
    save_file(tensors, folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "part.safetensors"}}))
    with pytest.raises(ConfigError, match=f"part.safetensors: tensor '{NORM}' is missing"):
        open_checkpoint(folder)


def test_sources_that_are_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a folder nor a .gguf file"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"neither config.json nor a .gguf file"):
        open_checkpoint(tmp_path)
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ConfigError, match=r"2 .gguf files: name one of them"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json cannot be read"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match=r"holds no \*.safetensors"):
        open_checkpoint(tmp_path)


def test_revision_is_stable_and_changes_with_any_weight_or_setting(folder: Path) -> None:
    first = open_checkpoint(folder).revision
    assert first == open_checkpoint(folder).revision
    assert len(first) == 16
    rewrite(folder, **{NORM: torch.ones(32)})
    second = open_checkpoint(folder).revision
    (folder / "config.json").write_text(json.dumps({**CONFIG, "rope_theta": 500.0}))
    assert len({first, second, open_checkpoint(folder).revision}) == 3


def test_fingerprint_of_a_large_file_reaches_its_middle_and_end(tmp_path: Path) -> None:
    file = tmp_path / "large"
    content = bytearray(50_000_000)
    seen = set()
    for position in (None, 10, 49_999_999, 25_000_000 - 100):
        if position is not None:
            content[position] ^= 1
        file.write_bytes(content)
        seen.add(fingerprint([file]))
    assert len(seen) == 4
