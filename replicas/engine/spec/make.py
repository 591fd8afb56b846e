"""`signalbox train-heads` and `signalbox distill-draft`: from a model and a text to an artefact, resumable throughout.

What is in the making lies in OUT/work: the model's own text and the training's last checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from replicas.engine.model_config import ModelConfig
from replicas.engine.spec.draft_layers import (
    STATES,
    TOKENS,
    DraftCheckpoint,
    DraftConfig,
    layer_tensors,
    save_draft,
    shallow,
    state_tensors,
)
from replicas.engine.spec.heads import HeadsConfig, save_heads
from replicas.engine.spec.self_text import Sample, frequent_tokens, make_prompts, read_self_text, write_self_text
from replicas.engine.spec.train import (
    Report,
    Schedule,
    Vocabulary,
    measure_draft,
    measure_heads,
    measure_state_draft,
    split,
    train_draft,
    train_heads,
    train_state_draft,
)
from replicas.engine.weights import Checkpoint, open_checkpoint
from replicas.protocol import ConfigError

Progress = Callable[[str, int, int, str], None]  # stage, done, of how many, what to say of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """texts, frame, ask: see `make_prompts`. tokens: of the model's own text to learn from. targets: ids to name."""

    model: str
    texts: tuple[Path, ...]
    frame: tuple[str, str]
    out: Path
    ask: bool = True
    tokens: int = 300_000
    targets: int = 4096


def _learn_from(material: Material, progress: Progress) -> tuple[Checkpoint, list[Sample], list[Sample], Vocabulary]:
    checkpoint = open_checkpoint(material.model)
    prompts = make_prompts(material.texts, material.frame, ask=material.ask)
    own_text = material.out / "work" / "text"
    write_self_text(
        material.model,
        prompts,
        own_text,
        tokens=material.tokens,
        report=lambda have: progress("writing", min(have, material.tokens), material.tokens, "tokens"),
    )
    samples = list(read_self_text(own_text))
    embed = checkpoint.tensor("model.embed_tokens.weight").float()
    tied = checkpoint.config.tie_word_embeddings
    learn, measure = split(samples)
    targets = torch.from_numpy(frequent_tokens(learn, material.targets))
    output = embed[targets] if tied else checkpoint.tensor("lm_head.weight").float()[targets]
    return checkpoint, learn, measure, Vocabulary(embed, output, targets)


def _training(progress: Progress, steps: int) -> Report:
    return lambda step, loss: progress("training", step, steps, f"loss {loss:.3f}")


def make_heads(
    material: Material, *, num_heads: int, sequential: bool, steps: int, batch: int, progress: Progress
) -> list[float]:
    """Writes the artefact; returns how often, on text held out, the first head is right, the first two, …"""
    checkpoint, learn, measure, vocabulary = _learn_from(material, progress)
    shape = checkpoint.config
    config = HeadsConfig(
        num_heads=num_heads,
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        base_revision=checkpoint.revision,
        sequential=sequential,
    )
    tensors = train_heads(
        learn,
        config,
        vocabulary,
        Schedule(steps=steps, batch=batch, rate=2e-3),
        material.out / "work" / f"heads-{num_heads}-{int(sequential)}.pt",
        _training(progress, steps),
    )
    save_heads(material.out, config, {**tensors, "targets": vocabulary.targets})
    return measure_heads(tensors, measure, config, vocabulary)


def make_draft(material: Material, *, layers: tuple[int, ...], steps: int, batch: int, progress: Progress) -> float:
    """Writes the artefact; returns how often, on text held out, it guesses the next token."""
    checkpoint, learn, measure, vocabulary = _learn_from(material, progress)
    shape: ModelConfig = shallow(checkpoint.config, layers)
    tensors = train_draft(
        learn,
        layer_tensors(checkpoint, layers),
        shape,
        vocabulary,
        Schedule(steps=steps, batch=batch, rate=5e-4),
        material.out / "work" / f"draft-{'-'.join(map(str, layers))}.pt",
        _training(progress, steps),
    )
    kept = _save(material.out, checkpoint, layers, TOKENS, tensors, vocabulary)
    return measure_draft(kept, measure, shape, vocabulary)


def make_state_draft(
    material: Material, *, layers: tuple[int, ...], depth: int, steps: int, batch: int, progress: Progress
) -> list[float]:
    """Writes the artefact; returns how often, on text held out, the first guess is right, the first two, …"""
    checkpoint, learn, measure, vocabulary = _learn_from(material, progress)
    shape: ModelConfig = shallow(checkpoint.config, layers)
    tensors = train_state_draft(
        learn,
        state_tensors(checkpoint, len(layers)),
        shape,
        vocabulary,
        depth,
        Schedule(steps=steps, batch=batch, rate=2e-3),
        material.out / "work" / f"states-{'-'.join(map(str, layers))}-{depth}.pt",
        _training(progress, steps),
    )
    kept = _save(material.out, checkpoint, layers, STATES, tensors, vocabulary)
    return measure_state_draft(kept, measure, shape, vocabulary, depth)


def _save(
    out: Path,
    checkpoint: Checkpoint,
    layers: tuple[int, ...],
    fed_with: str,
    tensors: dict[str, Tensor],
    vocabulary: Vocabulary,
) -> dict[str, Tensor]:
    """The tensors as the artefact has them, rounded."""
    shape = checkpoint.config
    config = DraftConfig(
        layers=layers,
        base_revision=checkpoint.revision,
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        fed_with=fed_with,
    )
    save_draft(out, config, tensors, vocabulary.targets)
    written = DraftCheckpoint(out, shape, checkpoint.revision, any_revision=False)
    return {name: written.tensor(name) for name in tensors}


def spread_layers(num_layers: int, wanted: int) -> tuple[int, ...]:
    """`wanted` of a model's layers, first and last among them, the rest evenly between; one: the first."""
    if not 1 <= wanted < num_layers:
        raise ConfigError(f"--layers must be between 1 and {num_layers - 1}, got {wanted}")
    return tuple(round(i * (num_layers - 1) / max(wanted - 1, 1)) for i in range(wanted))


def last_layers(num_layers: int, wanted: int) -> tuple[int, ...]:
    """The model's last ones: a draft on states has layers of their shape."""
    if not 1 <= wanted < num_layers:
        raise ConfigError(f"--layers must be between 1 and {num_layers - 1}, got {wanted}")
    return tuple(range(num_layers - wanted, num_layers))
