"""How many may wait for a model, and for how long: the document's `admission` made concrete. Pure.

The only queue is the engines' own, so a bound on a model is shared out among its replicas: every gateway sends each
replica the same share, and the shares add up to the bound however many gateways there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from policies.document_limits import Admission


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of what waits for one model: requests, their prompt tokens, and requests of one key. None: no bound."""

    queued: int | None = None
    queued_tokens: int | None = None
    queued_per_key: int | None = None

    def share(self, number: int, of: int) -> Bounds:
        """What the `number`-th of `of` replicas (from 0) may hold; at least one request each."""
        return Bounds(
            _share(self.queued, number, of),
            _share(self.queued_tokens, number, of),
            _share(self.queued_per_key, number, of),
        )


def _share(total: int | None, number: int, of: int) -> int | None:
    return None if total is None else max(total // of + (number < total % of), 1)


def bounds(admission: Admission | None, model: str) -> Bounds | None:
    """Those of a model; None where nothing is bounded."""
    if admission is None:
        return None
    own = admission.models.get(model, admission)
    found = Bounds(
        *(
            getattr(admission, name) if (value := getattr(own, name)) is None else value
            for name in ("max_queued", "max_queued_tokens", "max_queued_per_key")
        )
    )
    return None if found == Bounds() else found


def time_limit_s(admission: Admission | None, asked_s: float | None) -> float | None:
    """How long a request may take whose caller asks for that, or for nothing; None: as long as it takes."""
    if admission is None:
        return asked_s
    limits = [one for one in (asked_s or admission.deadline_s, admission.max_deadline_s) if one is not None]
    return min(limits, default=None)
