"""From logits to tokens, the whole batch at once.

Order, as vLLM has it: raw log-probabilities are of the logits as they come; then logit_bias, min_tokens, penalties,
temperature, min_p, top_k, top_p; then one token a row is drawn (`draw.py`).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from replicas.engine.draw import Draw, Inversion, is_greedy
from replicas.engine.sequence import Row
from replicas.engine.staging import Returned, staged


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
    draw: how, by inversion if it is not said.
    """

    def __init__(self, eos_token_ids: Seq[int], typical: Typical | None = None, draw: Draw | None = None) -> None:
        self._eos = tuple(eos_token_ids)
        self._typical = typical
        self._draw = draw or Inversion()

    def __call__(self, logits: Tensor, rows: Seq[Row]) -> list[Sampled]:
        """logits: float32 [R, V], row i for the next token of rows[i]; it may be overwritten. Returns R results."""
        return self.draw(logits, rows).read()

    def draw(self, logits: Tensor, rows: Seq[Row]) -> Drawn:
        """The same, without waiting for the device."""
        edited = self._apply_edits(logits, rows)
        chosen = self._draw(edited, rows)
        if self._typical is not None:
            _let_guesses_stand(self._typical, chosen, edited, rows)
        wanted = [(i, seq.sampling.logprobs) for i, seq in enumerate(rows) if seq.sampling.logprobs is not None]
        if not wanted:
            return Drawn(chosen, Returned(chosen), [])
        asked = staged([i for i, _ in wanted], logits.device)
        raw = logits if len(wanted) == len(rows) else logits[asked]
        # As log_softmax does it, less writing a number for every token: the greatest is taken off first, so that
        # logprobs near 0 keep their digits.
        best = raw.amax(dim=-1, keepdim=True)
        rest = (raw - best).exp_().sum(dim=-1, keepdim=True).log()
        own = raw.gather(1, chosen[asked].unsqueeze(1)) - best - rest
        values, ids = raw.topk(max(count for _, count in wanted), dim=-1)
        return Drawn(chosen, Returned(chosen, own.squeeze(1), values - best - rest, ids), wanted)

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


def _let_guesses_stand(rule: Typical, chosen: Tensor, logits: Tensor, rows: Seq[Row]) -> None:
    """Replace in `chosen`, int64 [R], what was drawn where the rule lets a row's guess stand; nothing is waited for."""
    guesses = [(i, row.guess) for i, row in enumerate(rows) if row.guess is not None and not is_greedy(row)]
    if not guesses:
        return
    places, guessed = staged(guesses, logits.device).unbind(dim=1)
    of_them = [rows[i].sampling.temperature for i, _ in guesses]
    temperature = staged(of_them, logits.device, torch.float32).unsqueeze(1)
    logits = logits if len(guesses) == len(rows) else logits[places]
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    weights = scaled.exp()
    total = weights.sum(dim=-1, dtype=torch.float64)
    # H = log(sum w) - sum(w log w) / sum w. A token that cannot be drawn would bring 0 * -inf.
    entropy = total.log() - (weights * scaled.clamp_min(-1e4)).sum(dim=-1, dtype=torch.float64) / total
    probability = weights.gather(1, guessed.unsqueeze(1)).squeeze(1) / total
    stands = probability > (rule.delta * (-entropy).exp()).clamp_max(rule.epsilon)
    chosen[places] = torch.where(stands, guessed, chosen[places])
