"""What is said to the ledger and what it answers. Amounts of money are pico-dollars, times Unix seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from policies.budget import Account, Price, Subject
from policies.limits import RateLimit, Standing
from replicas.protocol import RateLimited, Usage

# Where the usage of a request that has ended came from.
GATEWAY = "gateway"  # who answered has told it
JOURNAL = "journal"
RESERVED = "reserved"
CUT = "cut"  # what had come when it was cut short; its replica may have made more
COMPARED = "compared"  # cut, and since held against the journal of its replica


def attempt_id(request_id: str, attempt: int) -> str:
    """The id by which one attempt of a request is known to the ledger, the engine and its journal."""
    return f"{request_id}-r{attempt}" if attempt else request_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Spend:
    """What one attempt of a request may use at most, and who pays.

    max_tokens: of all its choices together. claimant: see `policies.limits`; a digest of key and body. fresh: known to
    be a first try.
    """

    request_id: str
    subject: Subject
    prompt_tokens: int
    max_tokens: int
    price: Price
    attempt: int = 0
    claimant: bytes = b""
    fresh: bool = False

    @property
    def id(self) -> str:
        return attempt_id(self.request_id, self.attempt)

    @property
    def most_usd(self) -> int:
        return self.price.most(self.prompt_tokens, self.max_tokens)

    @property
    def most_tokens(self) -> int:
        return self.prompt_tokens + self.max_tokens


@dataclass(frozen=True, slots=True)
class Reservation:
    """Held until `Ledger.settle` or `Ledger.release`.

    accounts: where it is reserved; without accounts and gates nothing is, and the usage is only recorded.
    used: account id to (pico-USD, tokens) spent and reserved, this included: for `policies.budget.downgrade`.
    standings: of each rate limit, for `policies.limits.headers`.
    """

    spend: Spend
    began_at: float
    accounts: tuple[Account, ...] = ()
    limits: tuple[RateLimit, ...] = ()
    used: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    standings: tuple[Mapping[str, Standing], ...] = ()

    @property
    def id(self) -> str:
        return self.spend.id

    @property
    def in_database(self) -> bool:
        return bool(self.accounts or self.limits)


class LimitReached(RateLimited):
    """With what the limits stand at, for the headers of the refusal."""

    def __init__(
        self, message: str, *, retry_after_s: float | None, standings: tuple[Mapping[str, Standing], ...]
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.standings = standings


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a request ended. `usage` None: nothing is charged. unbilled: tokens that were made and that nobody pays."""

    usage: Usage | None
    estimated: bool = False
    source: str = GATEWAY
    unbilled: int = 0


@dataclass(frozen=True, slots=True)
class Reserve:
    spend: Spend
    accounts: tuple[Account, ...]
    limits: tuple[RateLimit, ...]


@dataclass(frozen=True, slots=True)
class Close:
    """Settle or release one open request; answered by whether it was still open."""

    id: str
    ending: Ending


@dataclass(frozen=True, slots=True)
class Record:
    """Usage of a request that nothing was reserved for; answered by whether it was new."""

    spend: Spend
    ending: Ending
    began_at: float


@dataclass(frozen=True, slots=True)
class Beat:
    """Renew the gateway's lease."""


Operation = Reserve | Close | Record | Beat


class _Note(msgspec.Struct, array_like=True, frozen=True):
    key: str
    team: str
    model: str
    price: tuple[int, int, int, int]


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(_Note)


def note(spend: Spend) -> str:
    """Who pays what, for the replica's journal to keep: with it usage can be recorded without the gateway's memory."""
    price = spend.price
    prices = (price.input, price.cached_input, price.output, price.request)
    return _encoder.encode(_Note(spend.subject.key, spend.subject.team, spend.subject.model, prices)).decode()


def spend_of_note(id: str, text: str, usage: Usage) -> Spend | None:
    """The other way round; None where the text is not a note."""
    try:
        found = _decoder.decode(text)
    except msgspec.DecodeError:
        return None
    rates = found.price
    return Spend(
        request_id=id,
        subject=Subject(found.key, found.team, found.model),
        prompt_tokens=usage.prompt_tokens,
        max_tokens=usage.completion_tokens,
        price=Price(input=rates[0], cached_input=rates[1], output=rates[2], request=rates[3]),
    )
