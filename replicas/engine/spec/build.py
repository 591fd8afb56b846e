"""From an engine's configuration to the proposers that it asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from replicas.engine.attention import Attention, choose_attention
from replicas.engine.config import EngineConfig
from replicas.engine.graphs import Graph, choose_graphs
from replicas.engine.kv_format import plain_format
from replicas.engine.loading import Loaded
from replicas.engine.model import Decoder
from replicas.engine.ops import Ops, choose_ops
from replicas.engine.sampler import Typical
from replicas.engine.spec.chain import choose_chain
from replicas.engine.spec.config import Speculative
from replicas.engine.spec.draft_layers import CONFIG as DRAFT_CONFIG
from replicas.engine.spec.draft_layers import FUSE, STATES, DraftCheckpoint, SubsetHead, rounded_linear
from replicas.engine.spec.draft_model import DraftModel
from replicas.engine.spec.heads import open_heads
from replicas.engine.spec.lookup import Ngram, Suffix
from replicas.engine.spec.medusa import Medusa
from replicas.engine.spec.proposer import Proposer, likeliest
from replicas.engine.spec.speculation import Speculation
from replicas.engine.spec.state_draft import StateDraft
from replicas.engine.tokenizer import Tokenizer
from replicas.engine.weights import Checkpoint, open_checkpoint
from replicas.protocol import ConfigError


def typical_rule(settings: Speculative | None) -> Typical | None:
    if settings is None or settings.acceptance == "exact":
        return None
    return Typical(settings.typical_epsilon, settings.typical_delta)


def build_speculation(
    config: EngineConfig, loaded: Loaded, max_model_len: int, make_graph: Callable[[], Graph] | None = None
) -> Speculation:
    """Without `config.speculative` one that never guesses. ConfigError for artefacts that do not fit to the model.

    make_graph: what records a draft's steps; None runs them as they are.
    """
    settings = config.speculative
    if settings is None:
        return Speculation((), 0)
    ops = choose_ops(loaded.device, loaded.dtype)
    proposers: list[Proposer] = []
    for method in settings.methods:
        if method == "ngram":
            proposers.append(Ngram(settings.min_match))
        elif method == "suffix":
            proposers.append(Suffix(settings.min_match, settings.suffix_tokens))
        elif method == "medusa":
            proposers.append(_medusa(settings, loaded, ops))
        else:
            proposers.append(_draft_model(settings, config, loaded, ops, max_model_len, make_graph))
    return Speculation(proposers, settings.max_draft_tokens, adaptive=settings.adaptive)


def _medusa(settings: Speculative, loaded: Loaded, ops: Ops) -> Medusa:
    assert settings.heads is not None, "Speculative let medusa without heads pass"
    decoder = loaded.decoder
    heads, tensors = open_heads(
        settings.heads,
        hidden_size=decoder.config.hidden_size,
        vocab_size=decoder.config.vocab_size,
        revision=decoder.revision,
        any_revision=settings.any_revision,
    )
    return Medusa(heads, tensors, decoder, ops)


def _draft_model(
    settings: Speculative,
    config: EngineConfig,
    loaded: Loaded,
    ops: Ops,
    max_model_len: int,
    make_graph: Callable[[], Graph] | None,
) -> DraftModel | StateDraft:
    assert settings.model is not None, "Speculative let draft_model without a model pass"
    target, folder = loaded.decoder, Path(settings.model).expanduser()
    pool = {
        "kv_tokens": settings.draft_kv_tokens,
        "block_size": config.block_size,
        "max_sequences": config.max_num_seqs,
        "budget": loaded.max_num_batched_tokens,
    }
    if (folder / DRAFT_CONFIG).is_file():
        draft = DraftCheckpoint(
            folder,
            target.config,
            target.revision,
            any_revision=settings.any_revision,
            codes=ops.multiplies_quantized and loaded.device.type == "cpu",
        )
        decoder, make_graph = _decoder(draft, ops, loaded, config, max_model_len, make_graph, target)
        head = SubsetHead(target, draft.targets, ops)
        if draft.fed_with != STATES:
            return DraftModel(decoder, head, make_graph, **pool)
        fuse = rounded_linear(draft.tensor(FUSE).to(loaded.device, loaded.dtype), None, ops)
        return StateDraft(decoder, choose_chain(decoder, fuse, head, make_graph), **pool)
    checkpoint = open_checkpoint(settings.model)
    if Tokenizer.load(checkpoint).vocabulary() != loaded.tokenizer.vocabulary():
        raise ConfigError(
            f"speculative.model {settings.model!r}: its tokenizer does not have the model's vocabulary, so its guesses "
            "would mean other tokens",
            param="speculative.model",
        )
    longest = min(max_model_len, checkpoint.config.max_position_embeddings)
    decoder, make_graph = _decoder(checkpoint, ops, loaded, config, longest, make_graph)
    return DraftModel(decoder, _WholeHead(decoder, target.config.vocab_size), make_graph, **pool)


def _decoder(
    checkpoint: Checkpoint,
    ops: Ops,
    loaded: Loaded,
    config: EngineConfig,
    max_model_len: int,
    make_graph: Callable[[], Graph] | None,
    shared: Decoder | None = None,
) -> tuple[Decoder, Callable[[], Graph] | None]:
    """The draft's layers, and what records its steps if anything does."""
    attention: Attention = choose_attention(
        "auto",
        loaded.device,
        loaded.dtype,
        checkpoint.config.head_dim,
        plain_format(loaded.dtype),
        config.block_size,
        (checkpoint.config.num_heads, checkpoint.config.num_kv_heads),
    )
    decoder = Decoder(checkpoint, ops, attention, loaded.device, loaded.dtype, max_model_len, shared)
    recordable = choose_graphs(config.step_graphs, loaded.device, attention.name) is not None
    return decoder, make_graph if recordable else None


class _WholeHead:
    """A draft's own output layer, without the padding that it may have behind the target's vocabulary."""

    def __init__(self, decoder: Decoder, vocab_size: int) -> None:
        self._decoder, self._vocab_size = decoder, vocab_size

    def likeliest(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return likeliest(self._decoder.logits(hidden)[:, : self._vocab_size])
