"""From logits to tokens, the whole batch at once.

Order, as vLLM has it: raw log-probabilities are taken first; then logit_bias, min_tokens, penalties, temperature,
min_p, top_k, top_p; then one token a row by inverting the cumulative distribution at one uniform number. That number
is a hash of (seed, choice, position) and of nothing else, so a seeded request draws the same tokens whatever shares
its batch, and preemption changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from replicas.engine.sequence import Row
from replicas.engine.staging import Returned, staged

_MASK = (1 << 64) - 1
# Dividing logits by less would overflow float32; the likeliest token has all the mass long before.
_GREEDY_BELOW = 1e-5
_SORTED_FIRST = 1024
_SORTED_WHOLE = 1 << 22  # logits in all: 32 rows of 128k


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row's token; `logprob` and `top` ((token id, logprob), best first) only where the request wants them."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Drawn:
    """A step's tokens on their way to the host. tokens: int64 [R] on the device.

    returned: them and, where somebody wants them, own [W] and top [W, K] logprobs and the ids of those [W, K];
    wanted: (row, how many of the K) of each of the W.
    """

    tokens: Tensor
    returned: Returned
    wanted: list[tuple[int, int]]

    def read(self) -> list[Sampled]:
        """One for each row, once they are there."""
        tokens, *more = self.returned.lists()
        sampled = [Sampled(token) for token in tokens]
        if more:
            own, values, ids = more
            for at, (row, count) in enumerate(self.wanted):
                top = tuple(zip(ids[at][:count], values[at][:count], strict=True))
                sampled[row] = Sampled(tokens[row], own[at], top)
        return sampled


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) from a 64-bit mix of its arguments (the SplitMix64 finaliser, Steele et al. 2014)."""
    x = (seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03 + position * 0x8CB92BA72F3D8DD7) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & _MASK
    # A second round: seeds and positions are small, consecutive numbers.
    x = ((x ^ (x >> 31)) + 0x9E3779B97F4A7C15) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & _MASK
    return float((x ^ (x >> 31)) >> 11) * 2.0**-53


def _argmax(logits: Tensor) -> Tensor:
    """[R, V] -> int64 [R], the first of equals. On a CPU numpy's is vectorised and torch's is not (32 rows of 49,152 in
    0.4 ms against 1.8)."""
    return torch.from_numpy(logits.numpy().argmax(axis=-1)) if logits.device.type == "cpu" else logits.argmax(dim=-1)


@dataclass(frozen=True, slots=True)
class Typical:
    """Typical acceptance (Cai et al. 2024, arXiv:2401.10774, section 3.3.2): a guess stands if its probability is above
    min(epsilon, delta * exp(-entropy)), at the row's temperature. Not exact in distribution; greedy rows stay exact.
    """

    epsilon: float
    delta: float


class Sampler:
    """eos_token_ids: what `min_tokens` forbids beside the request's own stop_token_ids.

    typical: lets a row's guess stand where it is plausible; None draws every token from the target alone.
    """

    def __init__(self, eos_token_ids: Seq[int], typical: Typical | None = None) -> None:
        self._eos = tuple(eos_token_ids)
        self._typical = typical

    def __call__(self, logits: Tensor, rows: Seq[Row]) -> list[Sampled]:
        """logits: float32 [R, V], row i for the next token of rows[i]; it may be overwritten. Returns R results."""
        return self.draw(logits, rows).read()

    def draw(self, logits: Tensor, rows: Seq[Row]) -> Drawn:
        """The same, without waiting for the device."""
        device = logits.device
        wanted = [(i, seq.sampling.logprobs) for i, seq in enumerate(rows) if seq.sampling.logprobs is not None]
        asked = staged([i for i, _ in wanted], device) if wanted else None
        raw = None if asked is None else torch.log_softmax(logits[asked].float(), dim=-1)
        logits = self._apply_edits(logits, rows)
        chosen = _argmax(logits)
        drawn = [i for i, seq in enumerate(rows) if seq.sampling.temperature >= _GREEDY_BELOW]
        if drawn:
            places = staged(drawn, device)
            picked = logits if len(drawn) == len(rows) else logits[places]
            lots = [rows[i] for i in drawn]
            chosen[places] = self._draw(picked, lots)
            if self._typical is not None:
                self._let_guesses_stand(self._typical, chosen, drawn, picked, lots)
        if asked is None or raw is None:
            return Drawn(chosen, Returned(chosen), [])
        own = raw.gather(1, chosen[asked].unsqueeze(1)).squeeze(1)
        values, ids = raw.topk(max(count for _, count in wanted), dim=-1)
        return Drawn(chosen, Returned(chosen, own, values, ids), wanted)

    # ---------------------------------------------------------------- edits of the logits

    def _apply_edits(self, logits: Tensor, rows: Seq[Row]) -> Tensor:
        edited: list[tuple[int, int, float]] = []
        banned: list[tuple[int, int]] = []
        penalised: list[int] = []
        for i, seq in enumerate(rows):
            params = seq.sampling
            edited += [(i, token, bias) for token, bias in params.logit_bias]
            if seq.num_output < params.min_tokens:
                stops = params.stop_token_ids if params.ignore_eos else (*self._eos, *params.stop_token_ids)
                banned += [(i, token) for token in stops]
            if params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty:
                penalised.append(i)
        if edited:
            where = tuple(staged([(r, t) for r, t, _ in edited], logits.device).unbind(dim=1))
            bias = staged([b for _, _, b in edited], logits.device, logits.dtype)
            logits = logits.index_put(where, bias, accumulate=True)
        if banned:
            where = tuple(staged(banned, logits.device).unbind(dim=1))
            logits = logits.index_put(where, logits.new_full((), float("-inf")))
        if penalised:
            at = staged(penalised, logits.device)
            logits = logits.index_copy(0, at, self._penalise(logits[at], [rows[i] for i in penalised]))
        return logits

    def _penalise(self, logits: Tensor, rows: Seq[Row]) -> Tensor:
        """Repetition divides positive and multiplies negative logits of seen tokens (Keskar et al. 2019); presence and
        frequency subtract per output token (OpenAI)."""

        def counts(token_lists: list[list[int]]) -> Tensor:
            table = torch.zeros(logits.shape, device=logits.device)
            at = [(i, token) for i, tokens in enumerate(token_lists) for token in tokens]
            if at:
                where = staged(at, logits.device).unbind(dim=1)
                table.index_put_(where, torch.ones(len(at), device=logits.device), accumulate=True)
            return table

        def column(name: str) -> Tensor:
            values = [getattr(seq.sampling, name) for seq in rows]
            return staged(values, logits.device, logits.dtype).unsqueeze(1)

        seen = counts([seq.tokens for seq in rows]) > 0
        penalty = column("repetition_penalty")
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        output = counts([seq.output for seq in rows])
        return logits - output * column("frequency_penalty") - (output > 0) * column("presence_penalty")

    # ---------------------------------------------------------------- drawing

    def _draw(self, logits: Tensor, rows: Seq[Row]) -> Tensor:
        device = logits.device

        def column(values: list[float]) -> Tensor:
            return staged(values, device, torch.float32).unsqueeze(1)

        logits = logits / column([seq.sampling.temperature for seq in rows])
        lots = [uniform(seq.seed, seq.index, seq.num_output) for seq in rows]
        u = staged(lots, device, torch.float64).unsqueeze(1)
        if any(seq.sampling.min_p > 0 for seq in rows):
            # p < min_p * p_max, in logits: log p - log p_max = logit - max logit. log 0 = -inf keeps everything.
            floor = logits.amax(dim=-1, keepdim=True) + column([seq.sampling.min_p for seq in rows]).log()
            logits = logits.masked_fill(logits < floor, float("-inf"))
        vocab = logits.shape[-1]
        most = [min(seq.sampling.top_k or vocab, vocab) for seq in rows]
        top_k = staged(most, device).unsqueeze(1)
        top_p = staged([seq.sampling.top_p for seq in rows], device, torch.float64).unsqueeze(1)
        # Each row takes the path that its own settings choose: a neighbour must not change what a seed draws.
        # Which, is asked of the settings and not of the tensors: a device would have to be waited for.
        limited = [i for i, seq in enumerate(rows) if 0 < seq.sampling.top_k < vocab or seq.sampling.top_p < 1]
        if not limited:
            return self._draw_whole(logits, u)
        width, certain = _width(vocab, [most[i] for i in limited], device)
        if len(limited) == len(rows):
            return self._draw_limited(logits, top_k, top_p, u, width, certain)
        part = staged(limited, device)
        rest = staged(sorted(set(range(len(rows))) - set(limited)), device)
        chosen = torch.empty(len(rows), dtype=torch.int64, device=device)
        chosen[rest] = self._draw_whole(logits[rest], u[rest])
        chosen[part] = self._draw_limited(logits[part], top_k[part], top_p[part], u[part], width, certain)
        return chosen

    def _let_guesses_stand(
        self, rule: Typical, chosen: Tensor, drawn: list[int], logits: Tensor, rows: Seq[Row]
    ) -> None:
        for i, row, of_row in zip(drawn, rows, logits, strict=True):
            if row.guess is None:
                continue
            logprobs = torch.log_softmax(of_row.double() / row.sampling.temperature, dim=-1)
            entropy = -(logprobs.exp() * logprobs.clamp_min(-1e4)).sum()
            if logprobs[row.guess].exp() > min(rule.epsilon, rule.delta * float((-entropy).exp())):
                chosen[i] = row.guess

    def _draw_whole(self, logits: Tensor, u: Tensor) -> Tensor:
        return self._invert(torch.softmax(logits, dim=-1, dtype=torch.float64), u)

    def _draw_limited(
        self, logits: Tensor, top_k: Tensor, top_p: Tensor, u: Tensor, width: int, certain: bool
    ) -> Tensor:
        """Draw from the top_k likeliest tokens, of those from the smallest set whose mass reaches top_p.

        Both are prefixes of the sorted row. Sorting 50,000 logits costs as much as a layer, so only the first `width`
        are put in order; rows that turn out to need more are done again, sorted whole. certain: none can need more.
        """
        vocab = logits.shape[-1]
        values, ids = logits.topk(width, dim=-1)
        values = values.double().masked_fill(torch.arange(width, device=logits.device) >= top_k, float("-inf"))
        whole = torch.logsumexp(logits.double(), dim=-1, keepdim=True)
        total = torch.where(top_k <= width, torch.logsumexp(values, dim=-1, keepdim=True), whole)
        probs = (values - total).exp()
        mass = probs.cumsum(dim=-1)
        enough = ((top_k <= width) | ((top_k == vocab) & (mass[:, -1:] >= top_p))).squeeze(1)
        # Drop a token when the mass before it has reached top_p already; the first always stays.
        probs = probs.masked_fill((mass - probs >= top_p) & (top_p < 1), 0.0)
        chosen: Tensor = ids.gather(1, self._invert(probs, u).unsqueeze(1)).squeeze(1)
        if not certain and not enough.all():
            rest = ~enough
            chosen[rest] = self._draw_limited(logits[rest], top_k[rest], top_p[rest], u[rest], vocab, True)
        return chosen

    @staticmethod
    def _invert(probs: Tensor, u: Tensor) -> Tensor:
        """The first index whose cumulative mass exceeds u times the total: never one of probability 0."""
        mass = probs.cumsum(dim=-1)
        return torch.searchsorted(mass, u * mass[:, -1:], right=True).squeeze(1).clamp_(max=probs.shape[-1] - 1)


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
