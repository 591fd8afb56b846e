"""Who goes before whom: the rank of a request by its key, team and model, and by what its caller asks for. Pure.

A lower rank goes first. A caller may always go later than its own class; earlier only where the document says who may.
What a rank is worth in the engine's waiting line is `replicas.engine.waiting`'s to say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from policies.budget import EACH
from replicas.protocol import InvalidRequest, NotSupported

if TYPE_CHECKING:
    from policies.budget import Subject
    from policies.document_limits import Priorities, Tier

# Values of `service_tier` that ask for nothing.
NEUTRAL_TIERS = frozenset({None, "auto", "default"})


def check_tier(tier: str | None, priorities: Priorities | None) -> None:
    """NotSupported where the document does not say what this `service_tier` means."""
    if tier not in NEUTRAL_TIERS and (priorities is None or tier not in priorities.tiers):
        raise NotSupported("service_tier is not supported", param="service_tier")


def rank(subject: Subject, priorities: Priorities | None, tier: str | None, later_by: int) -> int:
    """The rank of a request whose caller asks for that `service_tier` and to come `later_by` ranks after its class.

    Raises InvalidRequest for a tier that would put the caller before its own class without leave.
    """
    if priorities is None:
        return later_by
    own = priorities.classes[_class(subject, priorities)]
    asked = None if tier is None else priorities.tiers.get(tier)  # type: ignore[call-overload]
    if asked is None:
        return own + later_by
    wanted = priorities.classes[asked.to]
    if wanted < own and not _may_go_first(subject, asked):
        raise InvalidRequest(f"service_tier: this key may not ask for {tier!r}", param="service_tier")
    return wanted + later_by


def _class(subject: Subject, priorities: Priorities) -> str:
    return (
        priorities.keys.get(subject.key)
        or priorities.teams.get(subject.team)
        or priorities.models.get(subject.model)
        or priorities.default
    )


def _may_go_first(subject: Subject, tier: Tier) -> bool:
    return not {subject.key, EACH}.isdisjoint(tier.keys) or not {subject.team, EACH}.isdisjoint(tier.teams)
