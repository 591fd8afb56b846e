"""Training that can be interrupted: heads (heads.py) and drafts (draft_layers.py) learn what the model itself wrote.

    train_heads    positions are independent: a state, the tokens after it, and the heads' guesses at those tokens
    train_draft    whole samples through the draft's layers, which begin as copies of the target's own
    train_state_draft    the same on the answers' tokens and the target's states

Heads and drafts on states minimise the cross-entropy with the model's own distribution (from its recorded states),
other drafts that with the tokens it wrote; all among `targets`, the ids that the artefact can name. AdamW, cosine from
`rate` to a tenth of it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from replicas.engine.model import rope_table
from replicas.engine.model_config import ModelConfig
from replicas.engine.spec.draft_layers import FUSE
from replicas.engine.spec.heads import HeadsConfig
from replicas.engine.spec.self_text import Sample
from replicas.protocol import ConfigError

IGNORED = -100
_HELD_OUT = 20  # every so manyeth prompt is for measuring
_DECAY = 0.8  # how much less each further head's loss counts
_STRETCH = 16  # neighbouring positions that are drawn together: the next one's guesses need the same distributions


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """steps of `batch` positions (heads) or samples (drafts). save_every: steps between checkpoints."""

    steps: int
    batch: int
    rate: float
    seed: int = 0
    save_every: int = 25


Report = Callable[[int, float], None]  # step, smoothed loss


class Vocabulary:
    """embed [V, H] of the model, and the output rows [N, H] of the N targets: neither is trained."""

    def __init__(self, embed: Tensor, output: Tensor, targets: Tensor) -> None:
        self.embed, self.output, self.targets = embed, output, targets
        self.place = torch.full((len(embed),), IGNORED)
        self.place[targets] = torch.arange(len(targets))


def _run(
    parameters: dict[str, nn.Parameter],
    loss_of: Callable[[int], Tensor],
    schedule: Schedule,
    file: Path,
    report: Report,
) -> None:
    """`schedule.steps` steps, continued from `file` if there is one; its schedule may have been shorter."""
    optimiser = torch.optim.AdamW(parameters.values(), lr=schedule.rate, weight_decay=0.01)
    first, smooth = 0, 0.0
    if file.is_file():
        held: dict[str, Any] = torch.load(file, weights_only=True)
        if held["steps"] <= schedule.steps and held["weights"].keys() == parameters.keys():
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(held["weights"][name])
            optimiser.load_state_dict(held["optimiser"])
            first, smooth = held["step"], held["loss"]
    for step in range(first, schedule.steps):
        rate = schedule.rate * (0.55 + 0.45 * math.cos(math.pi * step / schedule.steps)) * min(1.0, (step + 1) / 20)
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss = loss_of(step)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimiser.step()
        smooth = float(loss.detach()) if step == 0 else smooth + 0.05 * (float(loss.detach()) - smooth)
        if (step + 1) % schedule.save_every == 0 or step + 1 == schedule.steps:
            partial = file.with_suffix(".part")
            torch.save(
                {
                    "step": step + 1,
                    "steps": schedule.steps,
                    "loss": smooth,
                    "weights": {name: parameter.detach() for name, parameter in parameters.items()},
                    "optimiser": optimiser.state_dict(),
                },
                partial,
            )
            partial.replace(file)
            report(step + 1, smooth)


def split(samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """(for training, for measuring): all answers to a prompt are on one side. ConfigError if there is one prompt."""
    prompts = sorted({s.prompt.tobytes() for s in samples}, key=zlib.crc32)
    if len(prompts) < 2:
        raise ConfigError("all of the model's own text answers one prompt: nothing can be held out to measure with")
    measured = set(prompts[::_HELD_OUT])
    return (
        [s for s in samples if s.prompt.tobytes() not in measured],
        [s for s in samples if s.prompt.tobytes() in measured],
    )


# -------------------------------------------------------------------- heads


@dataclass(frozen=True, slots=True)
class Positions:
    """Of all samples after one another. states float16 [N, H]; tokens int64 [N, heads + 1]: the one that came next and
    those after it, or IGNORED; left int64 [N]: how many of the states that follow are the same sample's."""

    states: Tensor
    tokens: Tensor
    left: Tensor


def positions(samples: list[Sample], heads: int) -> Positions:
    tokens, left = [], []
    for sample in samples:
        count = len(sample.states)
        padded = np.concatenate((sample.output, np.full(heads, IGNORED, dtype=np.int32)))
        tokens.append(np.lib.stride_tricks.sliding_window_view(padded, heads + 1)[:count])
        left.append(np.arange(count - 1, -1, -1))
    states = np.concatenate([s.states for s in samples])
    return Positions(
        torch.from_numpy(states),
        torch.from_numpy(np.concatenate(tokens)).long(),
        torch.from_numpy(np.concatenate(left)),
    )


def head_logits(
    weights: dict[str, Any], config: HeadsConfig, states: Tensor, tokens: Tensor, vocabulary: Vocabulary
) -> Iterator[Tensor]:
    """Each head's logits over the targets, [N, targets], given the true tokens before its guess. Formulas: heads.py."""
    z = states
    for i in range(config.num_heads):
        grown = functional.linear(
            z if config.sequential else states, weights[f"heads.{i}.state.weight"], weights[f"heads.{i}.state.bias"]
        )
        if config.sequential:
            before = vocabulary.embed[tokens[:, i].clamp_min(0)]
            grown = grown + functional.linear(before, weights[f"heads.{i}.token.weight"])
        z = (z if config.sequential else states) + functional.silu(grown)
        yield functional.linear(z, vocabulary.output)


def train_heads(
    samples: list[Sample], config: HeadsConfig, vocabulary: Vocabulary, schedule: Schedule, file: Path, report: Report
) -> dict[str, Tensor]:
    """The heads' tensors, without `targets`."""
    torch.manual_seed(schedule.seed)
    weights = {
        name: nn.Parameter(torch.zeros(shape) if name.endswith("bias") else torch.randn(shape) * 0.01)
        for name, shape in config.shapes().items()
    }
    known, heads = positions(samples, config.num_heads), config.num_heads
    generator = torch.Generator()
    stretch = torch.arange(_STRETCH)

    def loss_of(step: int) -> Tensor:
        generator.manual_seed(schedule.seed * 1_000_003 + step)
        starts = torch.randint(len(known.states), (max(1, schedule.batch // _STRETCH), 1), generator=generator)
        rows = (starts + stretch).clamp_max(len(known.states) - 1).flatten()
        ahead = (starts + torch.arange(_STRETCH + heads)).clamp_max(len(known.states) - 1)
        with torch.no_grad():  # the model's own distributions, of every state once
            own = functional.linear(known.states[ahead].float(), vocabulary.output).softmax(dim=-1)
        total = torch.zeros(())
        guesses = head_logits(weights, config, known.states[rows].float(), known.tokens[rows], vocabulary)
        for i, logits in enumerate(guesses):
            wanted = own[:, i + 1 : i + 1 + _STRETCH].flatten(0, 1)
            counts = known.left[rows] > i
            if counts.any():
                losses = -(wanted * logits.log_softmax(dim=-1)).sum(dim=-1)
                total = total + _DECAY**i * losses[counts].mean()
        return total

    _run(weights, loss_of, schedule, file, report)
    return {name: parameter.detach() for name, parameter in weights.items()}


def _cross_entropy(logits: Tensor, tokens: Tensor, vocabulary: Vocabulary) -> Tensor:
    wanted = torch.where(tokens >= 0, vocabulary.place[tokens.clamp_min(0)], IGNORED)
    known = wanted != IGNORED
    return functional.cross_entropy(logits[known], wanted[known]) if known.any() else logits.sum() * 0


@torch.inference_mode()
def measure_heads(
    weights: dict[str, Tensor], samples: list[Sample], config: HeadsConfig, vocabulary: Vocabulary
) -> list[float]:
    """Share of positions where head i and all before it guess what the model wrote."""
    held = positions(samples, config.num_heads)
    states, tokens = held.states, held.tokens
    right, tried = np.zeros(config.num_heads), np.zeros(config.num_heads)
    for part in torch.split(torch.arange(len(states)), 512):
        alive = torch.ones(len(part), dtype=torch.bool)
        for i, logits in enumerate(head_logits(weights, config, states[part].float(), tokens[part], vocabulary)):
            there = tokens[part, i + 1] >= 0
            alive &= vocabulary.targets[logits.argmax(dim=-1)] == tokens[part, i + 1]
            right[i] += float((alive & there).sum())
            tried[i] += float(there.sum())
    return [float(share) for share in right / np.maximum(tried, 1)]


# -------------------------------------------------------------------- drafts


class Layers:
    """Some layers of a decoder as torch operations that can be differentiated; whole sequences, causal, no cache."""

    def __init__(self, weights: dict[str, Any], config: ModelConfig, longest: int) -> None:
        self._weights, self._config = weights, config
        self._cos, self._sin = rope_table(config, longest).chunk(2, dim=-1)

    def __call__(self, embeddings: Tensor) -> Tensor:
        """[B, T, H] -> normed [B, T, H]"""
        x = embeddings
        for index in range(self._config.num_layers):
            prefix = f"model.layers.{index}."
            x = x + self._attend(prefix + "self_attn.", self._norm(x, prefix + "input_layernorm"), index)
            y = self._norm(x, prefix + "post_attention_layernorm")
            gate, up = self._linear(y, prefix + "mlp.gate_proj"), self._linear(y, prefix + "mlp.up_proj")
            x = x + self._linear(functional.silu(gate) * up, prefix + "mlp.down_proj")
        return self._norm(x, "model.norm")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias"))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight: Tensor = self._weights[f"{name}.weight"]
        return functional.rms_norm(x, (x.shape[-1],), weight, self._config.rms_norm_eps)

    def _rotate(self, x: Tensor) -> Tensor:
        cos, sin = self._cos[: x.shape[2]], self._sin[: x.shape[2]]
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def _heads(self, prefix: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, H] -> queries, keys and values, turned, [B, heads, T, D]"""
        config, (rows, length, _) = self._config, x.shape
        q, k, v = (
            self._linear(x, f"{prefix}{name}_proj").view(rows, length, -1, config.head_dim).transpose(1, 2)
            for name in "qkv"
        )
        if config.qk_norm:
            q, k = self._norm(q, prefix + "q_norm"), self._norm(k, prefix + "k_norm")
        return self._rotate(q), self._rotate(k), v

    def _seen(self, length: int, index: int, back: int = 0) -> Tensor:
        """bool [T, T]: whether a query sees a key that is at least `back` places before it."""
        mask = torch.ones(length, length, dtype=torch.bool).tril(-back)
        window = self._config.windows[index]
        return mask if window is None else mask & ~mask.tril(-window)

    def _put_out(self, prefix: str, out: Tensor) -> Tensor:
        return self._linear(out.transpose(1, 2).flatten(2), prefix + "o_proj")

    def _attend(self, prefix: str, x: Tensor, index: int) -> Tensor:
        q, k, v = self._heads(prefix, x)
        mask = self._seen(q.shape[2], index)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self._put_out(prefix, out)


def _padded(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """tokens [B, T] and what each position should guess, IGNORED in prompts and padding."""
    longest = max(len(s.prompt) + len(s.output) for s in samples)
    tokens = torch.zeros(len(samples), longest, dtype=torch.int64)
    wanted = torch.full((len(samples), longest), IGNORED)
    for row, s in enumerate(samples):
        whole = torch.from_numpy(np.concatenate((s.prompt, s.output))).long()
        tokens[row, : len(whole)] = whole
        wanted[row, len(s.prompt) : len(whole) - 1] = whole[len(s.prompt) + 1 :]
    return tokens, wanted


def _batches(by_length: list[Sample], schedule: Schedule) -> Callable[[int], list[Sample]]:
    """By step, neighbours in length: little of a batch is padding."""
    generator = np.random.default_rng(schedule.seed)
    starts = generator.integers(0, max(len(by_length) - schedule.batch, 0) + 1, schedule.steps)
    return lambda step: by_length[starts[step] : starts[step] + schedule.batch]


def train_draft(
    samples: list[Sample],
    weights: dict[str, Tensor],
    config: ModelConfig,
    vocabulary: Vocabulary,
    schedule: Schedule,
    file: Path,
    report: Report,
) -> dict[str, Tensor]:
    """Fine-tuned copies of `weights` (draft_layers.layer_tensors); config: the shallow model's."""
    trained = {name: nn.Parameter(tensor.clone()) for name, tensor in weights.items()}
    layers = Layers(trained, config, 1 + max(len(s.prompt) + len(s.output) for s in samples))
    batch_of = _batches(sorted(samples, key=lambda s: len(s.prompt) + len(s.output)), schedule)

    def loss_of(step: int) -> Tensor:
        tokens, wanted = _padded(batch_of(step))
        hidden = layers(vocabulary.embed[tokens])
        asked = wanted != IGNORED
        return _cross_entropy(functional.linear(hidden[asked], vocabulary.output), wanted[asked], vocabulary)

    _run(trained, loss_of, schedule, file, report)
    return {name: parameter.detach() for name, parameter in trained.items()}


@torch.inference_mode()
def measure_draft(
    weights: dict[str, Tensor], samples: list[Sample], config: ModelConfig, vocabulary: Vocabulary
) -> float:
    """Share of output tokens that the draft guesses, given the true ones before it."""
    layers = Layers(weights, config, 1 + max(len(s.prompt) + len(s.output) for s in samples))
    right = tried = 0
    for sample in samples:
        tokens, wanted = _padded([sample])
        hidden, asked = layers(vocabulary.embed[tokens]), wanted != IGNORED
        guessed = vocabulary.targets[functional.linear(hidden[asked], vocabulary.output).argmax(dim=-1)]
        right += int((guessed == wanted[asked]).sum())
        tried += int(asked.sum())
    return right / max(tried, 1)


# -------------------------------------------------------------------- drafts on the target's states


class Unrolled(Layers):
    """`Layers` called once for every guess ahead, each time one place further from the states that the target computed.

    Row p of call s has token p, and of the places before it those up to p - s as the target's states gave them, the
    rest as earlier calls did: what the layers meet when they guess (the training-time test of EAGLE-3, Li et al. 2025,
    arXiv:2503.01840).
    """

    def __init__(self, weights: dict[str, Any], config: ModelConfig, longest: int) -> None:
        super().__init__(weights, config, longest)
        self._kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(config.num_layers)]

    def _attend(self, prefix: str, x: Tensor, index: int) -> Tensor:
        q, k, v = self._heads(prefix, x)
        groups = q.shape[1] // k.shape[1]
        kept = self._kept[index]
        kept.append((k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
        (first_k, first_v), back = kept[0], len(kept) - 1
        length, scale = q.shape[2], q.shape[-1] ** -0.5
        mask = self._seen(length, index, back)
        if not back:
            out = functional.scaled_dot_product_attention(q, first_k, first_v, attn_mask=mask)
            return self._put_out(prefix, out)
        scores = [(q @ first_k.transpose(2, 3)).masked_fill(~mask, -torch.inf)]
        scores += [(q * _later(kept[i][0], back - i)).sum(-1, keepdim=True) for i in range(1, back + 1)]
        shares = (torch.cat(scores, dim=-1) * scale).softmax(dim=-1)
        out = shares[..., :length] @ first_v
        for i in range(1, back + 1):
            out = out + shares[..., length + i - 1 : length + i] * _later(kept[i][1], back - i)
        return self._put_out(prefix, out)


def _later(x: Tensor, places: int) -> Tensor:
    """[B, heads, T, D] moved along T, zeros where nothing moves in."""
    return functional.pad(x, (0, 0, places, 0))[:, :, : x.shape[2]] if places else x


def _guesses(
    weights: dict[str, Any], config: ModelConfig, tokens: Tensor, states: Tensor, embed: Tensor, depth: int
) -> Iterator[Tensor]:
    """tokens [B, T], states [B, T, H] before each -> `depth` times the normed [B, T, H] from which token p + 1 is
    guessed at p, the s-th time with the draft's own last s states in place of the target's."""
    layers, embeddings = Unrolled(weights, config, tokens.shape[1]), embed[tokens]
    for _ in range(depth):
        # .float(): where products are taken in bfloat16, what they are added to is not
        states = layers(functional.linear(torch.cat((embeddings, states), dim=-1), weights[FUSE]).float())
        yield states
        states = functional.pad(states, (0, 0, 1, 0))[:, :-1]


def _multiplies_bfloat16() -> bool:
    """Whether this CPU does so faster than in float32: twice as fast with AVX-512's instructions for it."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _outputs(samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """tokens int64 [B, T], the states before them float32 [B, T, H], and how many of those each sample has, [B]."""
    counts = torch.tensor([len(s.states) for s in samples])
    tokens = torch.zeros(len(samples), int(counts.max()), dtype=torch.int64)
    states = torch.zeros(*tokens.shape, samples[0].states.shape[1])
    for row, s in enumerate(samples):
        count = len(s.states)
        tokens[row, :count] = torch.from_numpy(s.output[:count].astype(np.int64))
        states[row, :count] = torch.from_numpy(s.states).float()
    return tokens, states, counts


def train_state_draft(
    samples: list[Sample],
    weights: dict[str, Tensor],
    config: ModelConfig,
    vocabulary: Vocabulary,
    depth: int,
    schedule: Schedule,
    file: Path,
    report: Report,
) -> dict[str, Tensor]:
    """Trained copies of `weights` (draft_layers.state_tensors), for guesses up to `depth` ahead."""
    trained = {name: nn.Parameter(tensor.clone()) for name, tensor in weights.items()}
    batch_of = _batches(sorted((s for s in samples if len(s.states) > 2), key=lambda s: len(s.states)), schedule)

    def loss_of(step: int) -> Tensor:
        tokens, states, counts = _outputs(batch_of(step))
        place = torch.arange(tokens.shape[1])
        known = place < counts[:, None] - 1  # the next token's distribution is there
        total = torch.zeros(())
        with torch.autocast("cpu", torch.bfloat16, enabled=_multiplies_bfloat16()):
            with torch.no_grad():
                own = functional.linear(states[:, 1:][known[:, :-1]], vocabulary.output).float().softmax(dim=-1)
            for ahead, hidden in enumerate(_guesses(trained, config, tokens, states, vocabulary.embed, depth)):
                logits = functional.linear(hidden[known], vocabulary.output).float()
                losses = -(own * logits.log_softmax(dim=-1)).sum(dim=-1)
                total = total + _DECAY**ahead * losses[(place >= ahead).expand_as(known)[known]].mean()
        return total

    _run(trained, loss_of, schedule, file, report)
    return {name: parameter.detach() for name, parameter in trained.items()}


@torch.inference_mode()
def measure_state_draft(
    weights: dict[str, Tensor], samples: list[Sample], config: ModelConfig, vocabulary: Vocabulary, depth: int
) -> list[float]:
    """Share of places from where the first guess is what the model wrote, the first two are, …"""
    right, tried = np.zeros(depth), np.zeros(depth)
    for sample in samples:
        if len(sample.output) <= depth + 1:
            continue
        tokens, states, _ = _outputs([sample])
        count = tokens.shape[1] - depth  # the place from where the last guess is asked starts `depth` - 1 later
        alive = torch.ones(count, dtype=torch.bool)
        wanted = torch.from_numpy(sample.output.astype(np.int64))
        for ahead, hidden in enumerate(_guesses(weights, config, tokens, states, vocabulary.embed, depth)):
            guessed = functional.linear(hidden[0, ahead : ahead + count], vocabulary.output).argmax(dim=-1)
            alive &= vocabulary.targets[guessed] == wanted[ahead + 1 : ahead + 1 + count]
            right[ahead] += float(alive.sum())
            tried[ahead] += count
    return [float(share) for share in right / np.maximum(tried, 1)]
