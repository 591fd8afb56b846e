"""How a token is drawn from logits: who draws on which device, and what every way of drawing has in common.

A row's lot is a 64-bit hash of (seed, choice, position) and of nothing else, so a seeded request draws the same tokens
whatever shares its batch, and preemption changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from replicas.engine.sequence import Row
from replicas.engine.staging import staged

_MASK = (1 << 64) - 1
# Dividing logits by less would overflow float32; the likeliest token has all the mass long before.
GREEDY_BELOW = 1e-5
_SORTED_FIRST = 1024
_SORTED_WHOLE = 1 << 22  # logits in all: 32 rows of 128k

# (probabilities, float64 [N, W]; their token ids, int64 [N, W]; the rows' lots [N]) -> token ids, int64 [N].
Pick: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
# Draws, into `chosen` int64 [N], for rows for which the likeliest tokens were not enough, without saying which: (logits
# [N, V]; temperature, min_p, top_k, top_p, [4, N, 1]; the rows' lots [N]; bool [N], whether they were enough; chosen).
Rest: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


class Draw(Protocol):
    def __call__(self, logits: Tensor, rows: Seq[Row]) -> Tensor:
        """float32 [R, V], all edits made -> int64 [R] on the same device: the first of the greatest where a row's
        temperature is below GREEDY_BELOW, else a draw at its temperature, min_p, top_k and top_p. Logits stay."""
        ...


def choose_draw(device: torch.device) -> Draw:
    """Noise in one pass where Triton's kernels run, inversion elsewhere: hashing 50,000 numbers a row costs a CPU more
    than a transformer layer."""
    from replicas.engine.triton.device import obstacle
    from replicas.engine.triton.sampling import GumbelDraw

    if device.type == "cuda" and not obstacle(device, torch.float32):
        return GumbelDraw(device)
    return Inversion()


def mixed(seed: int, index: int, position: int) -> int:
    """A 64-bit mix of its arguments (the SplitMix64 finaliser, Steele et al. 2014)."""
    x = (seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03 + position * 0x8CB92BA72F3D8DD7) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & _MASK
    # A second round: seeds and positions are small, consecutive numbers.
    x = ((x ^ (x >> 31)) + 0x9E3779B97F4A7C15) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & _MASK
    return x ^ (x >> 31)


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) from the same mix."""
    return float(mixed(seed, index, position) >> 11) * 2.0**-53


def is_greedy(row: Row) -> bool:
    return row.sampling.temperature < GREEDY_BELOW


def is_limited(row: Row, vocab: int) -> bool:
    """Whether it draws from a prefix of its tokens, likeliest first. Asked of its own settings and of no tensor: a
    neighbour must not change what a seed draws, and a device would have to be waited for."""
    return not is_greedy(row) and (0 < row.sampling.top_k < vocab or row.sampling.top_p < 1)


class Inversion:
    """Inverts the cumulative distribution, in float64, at one uniform number a row."""

    def __call__(self, logits: Tensor, rows: Seq[Row]) -> Tensor:
        device, vocab = logits.device, logits.shape[-1]
        chosen = _argmax(logits)
        limited = [i for i, row in enumerate(rows) if is_limited(row, vocab)]
        whole = [i for i, row in enumerate(rows) if not is_greedy(row) and not is_limited(row, vocab)]
        for part, draw in ((whole, self._draw_whole), (limited, self._draw_limited)):
            if part:
                places = staged(part, device)
                chosen[places] = draw(logits if len(part) == len(rows) else logits[places], [rows[i] for i in part])
        return chosen

    def _draw_whole(self, logits: Tensor, rows: Seq[Row]) -> Tensor:
        def column(values: list[float]) -> Tensor:
            return staged(values, logits.device, torch.float32).unsqueeze(1)

        logits = logits / column([row.sampling.temperature for row in rows])
        if any(row.sampling.min_p > 0 for row in rows):
            # p < min_p * p_max, in logits: log p - log p_max = logit - max logit. log 0 = -inf keeps everything.
            floor = logits.amax(dim=-1, keepdim=True) + column([row.sampling.min_p for row in rows]).log()
            logits = logits.masked_fill(logits < floor, float("-inf"))
        return _invert(torch.softmax(logits, dim=-1, dtype=torch.float64), _lots(rows, logits.device))

    def _draw_limited(self, logits: Tensor, rows: Seq[Row]) -> Tensor:
        return draw_limited(logits, rows, _lots(rows, logits.device), self._pick)

    @staticmethod
    def _pick(probs: Tensor, ids: Tensor, lots: Tensor) -> Tensor:
        return ids.gather(1, _invert(probs, lots).unsqueeze(1)).squeeze(1)


def _lots(rows: Seq[Row], device: torch.device) -> Tensor:
    return staged([uniform(row.seed, row.index, row.num_output) for row in rows], device, torch.float64)


def _argmax(logits: Tensor) -> Tensor:
    """[R, V] -> int64 [R], the first of equals. On a CPU numpy's is vectorised and torch's is not (32 rows of 49,152 in
    0.4 ms against 1.8)."""
    return torch.from_numpy(logits.numpy().argmax(axis=-1)) if logits.device.type == "cpu" else logits.argmax(dim=-1)


def _invert(probs: Tensor, lots: Tensor) -> Tensor:
    """The first index whose cumulative mass exceeds its lot times the total: never one of probability 0."""
    mass = probs.cumsum(dim=-1)
    at = torch.searchsorted(mass, lots.unsqueeze(1) * mass[:, -1:], right=True)
    return at.squeeze(1).clamp_(max=probs.shape[-1] - 1)


# ---------------------------------------------------------------- the likeliest tokens


def draw_limited(logits: Tensor, rows: Seq[Row], lots: Tensor, pick: Pick, rest: Rest | None = None) -> Tensor:
    """Pick from the tokens that min_p leaves, of those the top_k likeliest, of those the smallest set whose mass
    reaches top_p. Each is a prefix of the row sorted by logits.

    Sorting 50,000 logits costs as much as a layer, so only the first 1,024 are put in order; rows that turn out to need
    more are left to `rest`, or done again, sorted whole.
    """
    vocab = logits.shape[-1]
    asked = [row.sampling for row in rows]
    most = [min(params.top_k or vocab, vocab) for params in asked]
    limits = [
        [params.temperature for params in asked],
        [params.min_p for params in asked],
        [float(count) for count in most],
        [params.top_p for params in asked],
    ]
    columns = staged(limits, logits.device, torch.float64).unsqueeze(-1)
    if rest is not None:
        few = min(_SORTED_FIRST, vocab)
        return _from_likeliest(logits, columns, lots, pick, few, max(most) <= few or few == vocab, rest)
    return _from_likeliest(logits, columns, lots, pick, *_width(vocab, most, logits.device))


def _from_likeliest(
    logits: Tensor,
    limits: Tensor,
    lots: Tensor,
    pick: Pick,
    width: int,
    certain: bool,
    rest: Rest | None = None,
) -> Tensor:
    """limits: temperature, min_p, top_k, top_p, [4, N, 1]. certain: no row can need more than `width` tokens."""
    temperature, min_p, top_k, top_p = limits
    values, ids = logits.topk(width, dim=-1)
    best = values[:, :1]
    # Of the likeliest token's probability: min_p asks for just that.
    weights = ((values.double() - best) / temperature).exp()
    beyond = torch.arange(width, device=logits.device) >= top_k
    weights = weights.masked_fill(beyond | (weights < min_p), 0.0)
    total = weights.sum(dim=-1, keepdim=True)
    if not certain:
        others = ((logits - best) / temperature.float()).exp()
        mass_of_all = others.masked_fill(others < min_p, 0.0).sum(dim=-1, keepdim=True, dtype=torch.float64)
        total = torch.where(top_k <= width, total, mass_of_all)
    probs = weights / total
    mass = probs.cumsum(dim=-1)
    enough = ((top_k <= width) | ((top_k == logits.shape[-1]) & (mass[:, -1:] >= top_p))).squeeze(1)
    # Drop a token when the mass before it has reached top_p already; the first always stays.
    chosen = pick(probs.masked_fill((mass - probs >= top_p) & (top_p < 1), 0.0), ids, lots)
    if certain:
        return chosen
    if rest is not None:
        rest(logits, limits, lots, enough, chosen)
    elif not enough.all():
        more = ~enough
        chosen[more] = _from_likeliest(logits[more], limits[:, more], lots[more], pick, logits.shape[-1], True)
    return chosen


def _width(vocab: int, most: list[int], device: torch.device) -> tuple[int, bool]:
    """How many of each row's likeliest tokens to put in order, and whether they are certainly enough.

    most: each row's top_k. Whether a nucleus fits into the first 1,024 only the device can say, and asking it means to
    wait for it, so there a few rows are rather sorted whole.
    """
    few = min(_SORTED_FIRST, vocab)
    if max(most) <= few:
        return few, True
    whole = device.type != "cpu" and len(most) * vocab <= _SORTED_WHOLE
    return (vocab, True) if whole else (few, few == vocab)
