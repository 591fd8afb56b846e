"""Tokenizers as folders and GGUF files bring them: bytes of tokens, bos, templates, special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from replicas.engine.config import EngineConfig
from replicas.engine.gguf_file import GGUFFile
from replicas.engine.model_config import ModelConfig, config_from_hf
from replicas.engine.tokenizer import Tokenizer, from_gguf, model_card, write_tokenizer_files
from replicas.protocol import ConfigError

TEXT = "  12 34\n 5 héllo 🤗 don't\t日本"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level() -> Backend:
    vocabulary = {token: at for at, token in enumerate(["<s>", "</s>", *ALPHABET, "he", "ĠĠ"])}
    backend = Backend(models.BPE(vocabulary, [("h", "e"), ("Ġ", "Ġ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens(["<tööl>"])
    return backend


def sentencepiece() -> Backend:
    """As Llama 2's: metaspace by normaliser, bytes for what the vocabulary lacks."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "e", "l", "o", "▁h", "▁he"]
    backend = Backend(
        models.BPE(
            {piece: at for at, piece in enumerate(pieces)},
            [("▁", "h"), ("▁h", "e")],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def load(folder: Path) -> Tokenizer:
    checkpoint: Any = SimpleNamespace(folder=folder, gguf=None)
    return Tokenizer.load(checkpoint)


def save(folder: Path, backend: Backend, **settings: Any) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", **settings}))
    return folder


@pytest.mark.parametrize("backend", [byte_level(), sentencepiece()], ids=["byte-level", "sentencepiece"])
def test_the_bytes_of_a_texts_tokens_joined_are_the_text(backend: Backend, tmp_path: Path) -> None:
    tokenizer = load(save(tmp_path, backend))
    ids = tokenizer.encode(TEXT)
    assert b"".join(map(tokenizer.token_bytes, ids)) == TEXT.encode()
    assert tokenizer.decode(ids) == TEXT
    assert any(len(tokenizer.token_bytes(at)) == 1 and tokenizer.token_bytes(at)[0] > 127 for at in ids)


def test_added_tokens_are_their_own_text_and_only_control_tokens_are_special(tmp_path: Path) -> None:
    tokenizer = load(save(tmp_path, byte_level()))
    (tool,) = tokenizer.encode("<tööl>")
    assert tokenizer.token_bytes(tool) == "<tööl>".encode()
    assert tokenizer.special_ids == {0, 1}
    assert tokenizer.token_bytes(0) == b"<s>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_ids_beyond_the_vocabulary_have_no_bytes(tmp_path: Path) -> None:
    tokenizer = load(save(tmp_path, byte_level()))
    assert (
        tokenizer.token_bytes(tokenizer.vocab_size) == tokenizer.token_bytes(10**9) == tokenizer.token_bytes(-1) == b""
    )


@pytest.mark.parametrize("said", [None, True, False])
@pytest.mark.parametrize("template", [True, False])
def test_bos_is_added_when_the_post_processor_does_as_in_transformers(
    said: bool | None, template: bool, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    backend = byte_level()
    if template:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    settings = {} if said is None else {"add_bos_token": said}
    save(tmp_path, backend, tokenizer_class="PreTrainedTokenizerFast", **settings)
    tokenizer = load(tmp_path)
    assert tokenizer.add_bos is template
    assert tokenizer.encode(TEXT) == AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"]


def test_bos_is_never_added_without_a_bos_token(tmp_path: Path) -> None:
    tokenizer = load(save(tmp_path, byte_level(), bos_token=None))
    assert not tokenizer.add_bos
    assert tokenizer.special_tokens == {"eos_token": "</s>"}


def test_a_prompt_that_brings_its_own_bos_gets_no_second_one(tmp_path: Path) -> None:
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = load(save(tmp_path, backend))
    assert tokenizer.encode("<s>he") == tokenizer.encode("he")


def test_a_stored_truncation_would_cut_prompts_and_is_removed(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(5)
    backend.enable_padding(length=50)
    tokenizer = load(save(tmp_path, backend))
    assert len(tokenizer.encode("x" * 20)) == 20
    assert len(Backend.from_str(tokenizer.json.decode()).encode("x" * 20).ids) == 20


@pytest.mark.parametrize(
    ("file", "setting", "expected"),
    [
        (None, None, ""),
        (None, "from config", "from config"),
        (None, [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}], "D"),
        ("from file", "from config", "from file"),
    ],
)
def test_the_chat_template_is_found_where_it_lies(
    file: str | None, setting: Any, expected: str, tmp_path: Path
) -> None:
    save(tmp_path, byte_level(), chat_template=setting)
    if file is not None:
        (tmp_path / "chat_template.jinja").write_text(file)
    assert load(tmp_path).chat_template == expected


def test_special_tokens_are_read_from_both_generations_of_files(tmp_path: Path) -> None:
    save(tmp_path, byte_level(), eos_token={"content": "</s>", "lstrip": False}, additional_special_tokens=["<x>"])
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "</s>", "bos_token": "old"}))
    assert load(tmp_path).special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}


def test_a_folder_without_any_tokenizer_and_a_broken_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{tmp_path.name}.* has no tokenizer\.json beside it"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not valid"):
        load(tmp_path)


def test_without_transformers_the_error_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"no tokenizer\.json beside it; .* needs the package transformers"):
        load(tmp_path)


def write_gguf(path: Path, **values: Any) -> GGUFFile:
    """A GGUF of metadata alone: a byte-level vocabulary, with changes."""
    writer = gguf.GGUFWriter(path, "llama")
    tokens = ["<|end|>", "<|start|>", *ALPHABET, "ĠĠ", "12"]
    settings: dict[str, Any] = {"model": "gpt2", "pre": "smollm", "bos_token_id": 1, "eos_token_id": 0, **values}
    for key, value in settings.items():
        if isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"tokenizer.ggml.{key}", value)
        else:
            writer.add_uint32(f"tokenizer.ggml.{key}", value)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["Ġ Ġ", "1 2"])
    writer.add_chat_template("{{ messages }}")
    # transformers reads the architecture's numbers before it reads the tokenizer
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


def test_a_gguf_vocabulary_that_splits_digits_is_split_as_llama_cpp_splits_it(tmp_path: Path) -> None:
    """transformers' converter takes every unknown `pre` for GPT-2's: "  12" became Ġ, Ġ, 12 instead of ĠĠ, 1, 2."""
    file = write_gguf(tmp_path / "x.gguf")
    tokenizer = from_gguf(file)
    assert [tokenizer.token_bytes(at) for at in tokenizer.encode("  12")] == [b"  ", b"1", b"2"]
    assert tokenizer.special_ids == {0, 1}
    assert tokenizer.vocab_size == len(file.metadata["tokenizer.ggml.tokens"]), "no id beyond the embedding"
    assert tokenizer.chat_template == "{{ messages }}"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(TEXT))) == TEXT.encode()


def test_files_written_beside_a_gguf_give_the_same_tokenizer(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", add_bos_token=True)
    converted = from_gguf(file)
    write_tokenizer_files(tmp_path / "x.gguf", tmp_path)
    beside = load(tmp_path)
    assert beside.json == converted.json
    for name in ("chat_template", "special_tokens", "add_bos", "bos_token_id", "eos_token_id", "special_ids"):
        assert getattr(beside, name) == getattr(converted, name), name
    assert beside.add_bos


@pytest.mark.parametrize(
    ("values", "adds"),
    [({}, False), ({"pre": "llama-bpe"}, True), ({"pre": "llama-bpe", "add_bos_token": False}, False)],
)
def test_a_gguf_that_does_not_say_adds_bos_as_llama_cpp_would(
    values: dict[str, Any], adds: bool, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "x.gguf", **values)
    assert from_gguf(file).add_bos is adds


def test_a_gguf_vocabulary_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", model="bert")
    with pytest.raises(ConfigError, match=r"x\.gguf: tokenizer 'bert' is not supported"):
        from_gguf(file)


def config(**changes: Any) -> ModelConfig:
    shape = {"vocab_size": 300, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return config_from_hf({"architectures": ["LlamaForCausalLM"], "num_attention_heads": 2, **shape, **changes})


def test_the_model_card_holds_what_a_gateway_needs(tmp_path: Path) -> None:
    tokenizer = load(save(tmp_path, byte_level(), chat_template="C"))
    checkpoint: Any = SimpleNamespace(config=config(eos_token_id=[4, 5]), revision="abc")
    settings = EngineConfig(model="x", max_model_len=64, block_size=8)
    card = model_card("name", settings, checkpoint, tokenizer, default_max_tokens=33)
    assert (card.model, card.revision, card.max_model_len, card.vocab_size, card.block_size) == (
        "name",
        "abc",
        64,
        300,
        8,
    )
    assert (card.eos_token_ids, card.default_max_tokens, card.chat_template) == ((4, 5), 33, "C")
    assert Backend.from_str(card.tokenizer_json.decode()).encode("he").ids == tokenizer.encode("he")
    checkpoint.config = config(eos_token_id=[])
    assert model_card("name", settings, checkpoint, tokenizer).eos_token_ids == (1,)
