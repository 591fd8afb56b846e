"""A model's tokenizer, chat template and special tokens, from a Hugging Face folder or out of a GGUF file.

What lies beside the weights (tokenizer.json, tokenizer_config.json, chat_template.jinja) is read as it is. Where there
is no tokenizer.json it is converted by transformers, imported only then; `write_tokenizer_files` does that once, when a
model is pulled, so that neither the engine nor a gateway needs transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from replicas.engine.config import EngineConfig
from replicas.engine.gguf_file import GGUFFile
from replicas.engine.weights import Checkpoint, read_json
from replicas.protocol import ConfigError, ModelCard

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_GGUF_SPECIAL_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# llama.cpp's names (llama-vocab.cpp) of vocabularies that split every digit off before GPT-2's pattern applies, and of
# those that take a whole word from the vocabulary before trying merges; transformers' converter knows neither.
_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_IGNORE_MERGES = ("llama3", "llama-v3", "llama-bpe", "tekken")
_BOS_UNLESS_DENIED = ("llama3", "llama-v3", "llama-bpe")


class Tokenizer:
    """Text to ids and ids to bytes.

    json: the `tokenizers` file, without truncation or padding. add_bos: whether a plain prompt starts with bos_token
    (a chat template writes it itself); tokenizer.json's post-processor decides that, as in transformers 5, which
    ignores add_bos_token beside it. special_ids: control tokens, which have no place in output text.
    """

    def __init__(self, source: str, chat_template: str, special_tokens: Mapping[str, str]) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_str(source)
        except Exception as error:  # tokenizers raises bare Exception
            raise ConfigError(f"tokenizer.json is not valid: {error}") from error
        if self._backend.truncation is not None or self._backend.padding is not None:
            self._backend.no_truncation()  # or an over-long prompt would be cut without a word
            self._backend.no_padding()
            source = self._backend.to_str()
        self.json = source.encode()
        self.chat_template, self.special_tokens = chat_template, dict(special_tokens)
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")
        self.add_bos = self.bos_token_id in self._backend.encode("a").ids[:1]
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._added = {token_id: token.content.encode() for token_id, token in added.items()}

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> Tokenizer:
        """The tokenizer of an opened model; ConfigError saying what is missing if there is none."""
        folder, settings = checkpoint.folder, _tokenizer_config(checkpoint.folder)
        template = _template_beside(folder, settings)
        if (folder / "tokenizer.json").is_file():
            source = (folder / "tokenizer.json").read_text(encoding="utf-8")
        elif checkpoint.gguf is None:
            source = _convert(folder, None)
        else:
            return from_gguf(checkpoint.gguf)
        specials = _specials_beside(folder, settings)
        if checkpoint.gguf is not None:
            template = template or str(checkpoint.gguf.metadata.get("tokenizer.chat_template", ""))
            specials = specials or _gguf_specials(checkpoint.gguf)
        return cls(source, template, specials)

    @property
    def vocab_size(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def vocabulary(self) -> dict[str, int]:
        """Every token and its id, added ones included."""
        found: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return found

    def encode(self, text: str) -> list[int]:
        """Ids of a plain prompt, bos_token first (never twice) where the model wants it; special tokens are known."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        if self.bos_token_id is None or not self.add_bos or ids[:1] == [self.bos_token_id]:
            return ids
        return [self.bos_token_id, *ids]

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that this token stands for, perhaps part of a character; b"" for ids without a token."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    @cached_property
    def _bytes(self) -> list[bytes]:
        steps = _decoder_steps(json.loads(self.json).get("decoder"))
        table = [b""] * (max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1)
        for token, token_id in self._backend.get_vocab(with_added_tokens=True).items():
            table[token_id] = self._added.get(token_id) or _spelled(token, steps)
        return table

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        found: int | None = None if token is None else self._backend.token_to_id(token)
        return found


def model_card(
    name: str, config: EngineConfig, checkpoint: Checkpoint, tokenizer: Tokenizer, *, default_max_tokens: int = 0
) -> ModelCard:
    """What a gateway must know of this model; a model that names no end-of-sequence ids gets its tokenizer's."""
    model, eos = checkpoint.config, tokenizer.eos_token_id
    return ModelCard(
        model=name,
        revision=checkpoint.revision,
        max_model_len=model.model_len(config.max_model_len),
        vocab_size=model.vocab_size,
        block_size=config.block_size,
        tokenizer_json=tokenizer.json,
        chat_template=tokenizer.chat_template,
        special_tokens=tokenizer.special_tokens,
        add_bos=tokenizer.add_bos,
        eos_token_ids=model.eos_token_ids or (() if eos is None else (eos,)),
        default_max_tokens=default_max_tokens,
    )


def from_gguf(file: GGUFFile) -> Tokenizer:
    """Build the tokenizer that a GGUF's metadata describes."""
    kind, pre = file.metadata.get("tokenizer.ggml.model"), file.metadata.get("tokenizer.ggml.pre", "default")
    if kind not in ("gpt2", "llama"):
        raise ConfigError(
            f"{file.path.name}: tokenizer {kind!r} is not supported (gpt2 and llama are); needs a tokenizer.json"
        )
    content = json.loads(_convert(file.path.parent, file.path.name))
    if pre in _DIGITS_APART:
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        digits = {"type": "Digits", "individual_digits": True}
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    if pre in _IGNORE_MERGES:
        content["model"]["ignore_merges"] = True
    # transformers adds an unk_token of its own choice where the file has none: an id beyond the embedding.
    tokens, specials = file.metadata.get("tokenizer.ggml.tokens", []), _gguf_specials(file)
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < len(tokens)]
    content["post_processor"] = None
    if "bos_token" in specials and _gguf_add_bos(file):
        content["post_processor"] = _prepend(specials["bos_token"], file.metadata["tokenizer.ggml.bos_token_id"])
    template = str(file.metadata.get("tokenizer.chat_template", ""))
    return Tokenizer(json.dumps(content, ensure_ascii=False), template, specials)


def write_tokenizer_files(gguf: Path, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, as `Tokenizer.load` reads them."""
    tokenizer = from_gguf(GGUFFile(gguf))
    settings = {**tokenizer.special_tokens, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer.json").write_bytes(tokenizer.json)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if tokenizer.chat_template:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def _convert(folder: Path, gguf_file: str | None) -> str:
    """tokenizer.json's content, converted by transformers from a GGUF or from a folder's older tokenizer files."""
    what = gguf_file or f"model folder {folder.name!r}"
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConfigError(
            f"{what} has no tokenizer.json beside it; converting its tokenizer needs the package transformers"
        ) from error
    try:
        options = {} if gguf_file is None else {"gguf_file": gguf_file}
        source: str = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options).backend_tokenizer.to_str()
    except Exception as error:  # transformers raises what it likes here: KeyError, OSError, ValueError, ImportError
        raise ConfigError(
            f"{what} has no tokenizer.json beside it and its tokenizer cannot be converted: {error}"
        ) from error
    return source


def _prepend(token: str, token_id: int) -> dict[str, Any]:
    """A post-processor that puts one token before every text."""
    special, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return read_json(file) if file.is_file() else {}


def _template_beside(folder: Path, settings: Mapping[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template") or ""
    if isinstance(template, list):  # several named ones
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default") or ""
    return str(template)


def _specials_beside(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    older = folder / "special_tokens_map.json"
    values = {**(read_json(older) if older.is_file() else {}), **settings}
    found = {name: values[name] for name in _SPECIAL_NAMES if values.get(name)}
    return {name: value["content"] if isinstance(value, dict) else str(value) for name, value in found.items()}


def _gguf_specials(file: GGUFFile) -> dict[str, str]:
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    ids = {name: file.metadata.get(f"tokenizer.ggml.{key}") for name, key in _GGUF_SPECIAL_IDS.items()}
    return {name: tokens[at] for name, at in ids.items() if at is not None and at < len(tokens)}


def _gguf_add_bos(file: GGUFFile) -> bool:
    """As llama.cpp decides it: what the file says, else yes for sentencepiece and the Llama 3 vocabularies."""
    said = file.metadata.get("tokenizer.ggml.add_bos_token")
    if said is not None:
        return bool(said)
    pre = file.metadata.get("tokenizer.ggml.pre")
    return file.metadata.get("tokenizer.ggml.model") == "llama" or pre in _BOS_UNLESS_DENIED


def _decoder_steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    return list(decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]


def _spelled(token: str, steps: list[Mapping[str, Any]]) -> bytes:
    """Undo, for one token alone, what the decoder steps undo for a text; steps that join or strip do not apply."""
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel" and all(char in _BYTE_OF_CHAR for char in token):
            return bytes(_BYTE_OF_CHAR[char] for char in token)
        if kind == "ByteFallback" and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        if kind == "Replace" and "String" in step["pattern"]:
            token = token.replace(step["pattern"]["String"], step["content"])
        if kind == "Metaspace":
            token = token.replace(step["replacement"], " ")
    return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: a printing byte is its own Latin-1 character, the others follow from U+0100."""
    printing = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()
