"""What an engine is told of speculation: one frozen value, each default written here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

from replicas.protocol import ConfigError

METHODS = ("ngram", "suffix", "medusa", "draft_model")
ACCEPTANCES = ("exact", "typical")


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculative:
    """`engine_settings: {speculative: {method: ngram}}` of a fleet file has exactly these keys.

    method: one of METHODS or several of them, of which the most promising speaks for a sequence in each step.
        ngram: what followed the same tokens earlier in the same sequence (prompt lookup).
        suffix: as ngram, and what followed them in earlier finished requests of the same tenant. Whoever shares a
            tenant name may notice by timing what the others were answered: to be chosen deliberately.
        medusa: `heads` on the target's last hidden state. draft_model: a smaller `model` that runs ahead.
    max_draft_tokens: guesses of one sequence in one step, at most.
    adaptive: choose their number for each sequence and step by what they measurably bring; false: always the most.
    heads: folder that `signalbox train-heads` wrote. model: folder, .gguf file or what `signalbox distill-draft` wrote.
    any_revision: take heads or layers that were made for other weights of the same shape (a quantised copy, say).
    min_match: tokens that must agree before a lookup proposes what follows.
    suffix_tokens: tokens of earlier requests that are kept, of all tenants together; the longest unused go first.
    draft_kv_tokens: size of the draft model's own KV pool.
    acceptance: "exact" draws every token from the target's distribution; "typical" lets plausible guesses stand
        (Medusa's rule), which changes what is sampled at temperatures above 0.
    typical_epsilon, typical_delta: a guess is plausible with a probability above min(epsilon, delta * exp(-entropy)).
    """

    method: str | tuple[str, ...]
    max_draft_tokens: int = 8
    adaptive: bool = True
    heads: str | None = None
    model: str | None = None
    any_revision: bool = False
    min_match: int = 2
    suffix_tokens: int = 500_000
    draft_kv_tokens: int = 32_768
    acceptance: str = "exact"
    typical_epsilon: float = 0.09
    typical_delta: float = 0.3

    def __post_init__(self) -> None:
        self._check_methods()
        for name, most in _COUNTS:
            if not 1 <= getattr(self, name) <= most:
                raise _refused(name, f"must be between 1 and {most}, got {getattr(self, name)!r}")
        if self.acceptance not in ACCEPTANCES:
            raise _refused("acceptance", f"{self.acceptance!r} is unknown; use {', '.join(ACCEPTANCES)}")
        for name in ("typical_epsilon", "typical_delta"):
            if not 0 < getattr(self, name) <= 1:
                raise _refused(name, f"must be greater than 0 and at most 1, got {getattr(self, name)!r}")

    def _check_methods(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise _refused("method", f"{method!r} is not supported; use {', '.join(METHODS)}")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise _refused("method", f"names each method once, got {self.method!r}")
        if "ngram" in self.methods and "suffix" in self.methods:
            raise _refused("method", "'suffix' looks into the sequence itself too: leave 'ngram' out")
        for name, method in (("heads", "medusa"), ("model", "draft_model")):
            if (getattr(self, name) is not None) is not (method in self.methods):
                raise _refused(name, f"is needed by method {method!r} and by no other")

    @property
    def methods(self) -> tuple[str, ...]:
        return (self.method,) if isinstance(self.method, str) else tuple(self.method)


_COUNTS = (("max_draft_tokens", 32), ("min_match", 16), ("suffix_tokens", 2**31), ("draft_kv_tokens", 2**31))


def _refused(key: str, why: str) -> ConfigError:
    return ConfigError(f"speculative.{key} {why}", param=f"speculative.{key}")
