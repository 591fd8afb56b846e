"""Who is served next, and who may still get in line. Knows no tensors, no tokens and no blocks.

    front        those that had a place already and lost it, and forks of those that run: before everybody
    accounts     one line per (priority, key), first come first served within it

Among the keys of one priority the one that has had the least goes first: every account is charged for what its
requests cost, and one that comes back after a pause is lifted to what those being served had had a minute ago, so that
nobody saves up more than a minute. That is the virtual token counter of Sheng et al., "Fairness in Serving Large
Language Models" (OSDI 2024), with the virtual time of start-time fair queueing (Goyal et al., SIGCOMM 1996); the minute
is ours. Without it a key that keeps within its share, but not evenly, would be held to its share at every instant as
soon as another floods; with it, it goes before the flood. Two keys that both always have something waiting never drift
further apart than what all that run at once can cost.

Priorities are head starts: each rank is worth `priority_aging_s` of waiting, so that a lower class comes late but is
never starved (None: strictly by rank, as vLLM does, and then it can be).

A key *floods* while what it had lately (in about a quarter of a minute) and what it has waiting is more than twice what
the others had and have on the average. That tells one that sends ten times its share within a second or two, and hardly
ever one that keeps to it; what is done about it, `turn` says.

A key may hold four times the places that are left: 4/5 of the line when it is alone (dynamic thresholds: Choudhury and
Hahne, IEEE/ACM Transactions on Networking 6(2), 1998), so one that floods is refused while others still get in.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from replicas.protocol import ConfigError, GenerateRequest, QueueFull

# The defaults of every engine's settings.
MAX_WAITING = 1024
PRIORITY_AGING_S = 60.0
FAIR_RESERVE = 0.125

# What a generated token costs in computed prompt tokens: the weight that the authors of VTC use.
OUTPUT_WEIGHT = 2.0

_GREED = 4  # a key may hold this many times the places that are left
_LATELY_S = 60.0  # how long a key that is silent counts as somebody who may come, and keeps what it did not use
_USED_S = 15.0  # time constant of what an account had lately
_FLOOD = 2.0  # a key floods that wants more than so many times the others' average
_SAMPLE_S = 1.0  # of a line that is never empty, to measure how fast it moves
_IDLE_ACCOUNTS = 1024  # that are remembered although nothing of theirs waits or runs


@dataclass(frozen=True, slots=True, kw_only=True)
class LineLimits:
    """Bounds of the waiting line; see EngineConfig. ConfigError names a value that nobody can work with."""

    max_waiting: int = MAX_WAITING
    max_waiting_tokens: int | None = None
    max_waiting_per_key: int | None = None
    priority_aging_s: float | None = PRIORITY_AGING_S
    fair_reserve: float = FAIR_RESERVE

    def __post_init__(self) -> None:
        for name in ("max_waiting", "max_waiting_tokens", "max_waiting_per_key", "priority_aging_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be greater than 0, got {value!r}", param=name)
        if not 0 <= self.fair_reserve < 1:
            raise ConfigError(
                f"fair_reserve must be at least 0 and less than 1, got {self.fair_reserve!r}", param="fair_reserve"
            )

    def reserved(self, count: int) -> int:
        """How many of `count` seats or blocks are kept for keys with less than their share: never all of them."""
        return min(math.ceil(self.fair_reserve * count), count - 1)


@dataclass(slots=True, eq=False)
class Account:
    """One key within one priority. cost: what its requests have cost so far. seats: how much of it runs.

    used: of that what is recent, fading with _USED_S, as of used_at.
    line: its waiting requests, oldest first, with the instant each came and its prompt tokens; tokens: their sum.
    listed: it has an entry in its class's heap. promised: until when refused requests were told to stay away.
    """

    priority: int = 0
    key: str = ""
    cost: float = 0.0
    used: float = 0.0
    used_at: float = 0.0
    seats: int = 0
    tokens: int = 0
    line: OrderedDict[Any, tuple[float, int]] = field(default_factory=OrderedDict)
    listed: bool = False
    promised: float = 0.0

    def charge(self, cost: float, now: float) -> None:
        self.cost += cost
        self.used = self.used_lately(now) + cost
        self.used_at = now

    def used_lately(self, now: float) -> float:
        return self.used * math.exp((self.used_at - now) / _USED_S) if self.used else 0.0


class Waiter(Protocol):
    """What can stand in the line; hashed by identity."""

    account: Account


W = TypeVar("W", bound=Waiter)


@dataclass(slots=True)
class _Class:
    """heap: (cost when it was listed, a number, account); costs only grow, so a stale entry is a lower bound.

    virtual: what the last one served had had before. past: what it was, at most once a second of the last minute.
    """

    heap: list[tuple[float, int, Account]] = field(default_factory=list)
    virtual: float = 0.0
    past: deque[tuple[float, float]] = field(default_factory=deque)

    def serve(self, cost: float, now: float) -> None:
        if not self.past or now - self.past[-1][0] >= 1.0:
            self.past.append((now, self.virtual))
        self.virtual = max(self.virtual, cost)

    def entry(self, now: float) -> float:
        """What one who was away starts at."""
        past = self.past
        while len(past) > 1 and past[1][0] <= now - _LATELY_S:
            past.popleft()
        if not past or past[0][0] > now - _LATELY_S:
            return 0.0
        return past[0][1]


class WaitingLine(Generic[W]):
    """O(log n) an operation, amortised over what is charged; walking over it is O(n). `now` is the caller's clock."""

    def __init__(self, limits: LineLimits) -> None:
        self.limits = limits
        self.tokens = 0
        self._front: OrderedDict[W, None] = OrderedDict()
        self._classes: dict[int, _Class] = {}
        self._accounts: dict[tuple[int, str], Account] = {}
        self._recent: OrderedDict[str, float] = OrderedDict()
        self._numbers = itertools.count()
        self._waiting = 0  # in lines, not in front
        self._everybody = Account()  # what all had together
        self._lines = 0  # that are not empty
        self._sweep_at = 2 * _IDLE_ACCOUNTS
        self._rate = 0.0
        self._sampled_from = 0.0
        self._sampled = 0

    # ---------------------------------------------------------------- getting in

    def __len__(self) -> int:
        return len(self._front) + self._waiting

    def __iter__(self) -> Iterator[W]:
        """Those in front, then line by line."""
        yield from self._front
        for account in self._accounts.values():
            yield from account.line

    def __contains__(self, item: W) -> bool:
        return item in self._front or item in item.account.line

    def full(self) -> bool:
        limits = self.limits
        return len(self) >= limits.max_waiting or (
            limits.max_waiting_tokens is not None and self.tokens >= limits.max_waiting_tokens
        )

    def check(self, request: GenerateRequest, now: float) -> None:
        """QueueFull, with the time after which one who comes again finds a place, or None if it may get in line."""
        reason = self._refusal(request)
        if reason is not None:
            raise QueueFull(reason, retry_after_s=self._retry_after(request, now))

    def add(self, item: W, request: GenerateRequest, tokens: int, now: float) -> None:
        """`item` stands for `request`, of whose prompt `tokens` are to compute."""
        account = item.account = self._account(request)
        self._hear(request.fair_key, now)
        if not account.line:
            # What it did not ask for while it was away is not owed to it.
            account.cost = max(account.cost, self._class(account).entry(now))
            self._lines += 1
        if self._waiting == 0:
            self._sampled_from, self._sampled = now, 0
        account.line[item] = now, tokens
        account.tokens += tokens
        self._waiting += 1
        self.tokens += tokens
        self._list(account)

    def put_back(self, item: W, now: float) -> None:
        """Before the others of its own key: it had a place and gave it up to another key."""
        account = item.account
        self._lines += not account.line
        self._waiting += 1
        account.line[item] = now, 0
        account.line.move_to_end(item, last=False)
        self._list(account)

    def push_front(self, item: W) -> None:
        """Before everybody; its account is the one it has."""
        self._front[item] = None
        self._front.move_to_end(item, last=False)

    def _refusal(self, request: GenerateRequest) -> str | None:
        limits, key = self.limits, request.fair_key
        places = min(limits.max_waiting, request.max_queued or limits.max_waiting)
        if len(self) >= places:
            return f"{len(self)} requests are waiting already"
        if self.full() or (request.max_queued_tokens is not None and self.tokens >= request.max_queued_tokens):
            return f"{self.tokens} prompt tokens are waiting already"
        account = self._accounts.get((request.priority, key))
        mine = len(account.line) if account is not None else 0
        share = request.max_queued_per_key or limits.max_waiting_per_key
        if key and (mine >= share if share is not None else mine >= _GREED * (places - len(self))):
            return f"{mine} requests of this key are waiting already"
        return None

    def _retry_after(self, request: GenerateRequest, now: float) -> float:
        """Seconds until a place in the line should be free for this key.

        Places become free at the measured rate and go to the keys in turn. Each refusal books the next one, so that
        clients who all do as they are told do not meet again at one place.
        """
        account, rate = self._account(request), self._places_per_s(now)
        account.promised = max(account.promised, now) + max(self._lines, 1) / rate
        # After so long everybody who waits now has gone.
        account.promised = min(account.promised, now + (len(self) + 1) / rate)
        return max(account.promised - now, 0.1)

    def _places_per_s(self, now: float) -> float:
        elapsed = max(now - self._sampled_from, _SAMPLE_S) if self._waiting else _SAMPLE_S
        rate = self._rate or max(self._sampled, 1) / elapsed
        # A line that came to a halt after the last sample is slower than that said.
        return min(rate, max(self._sampled + 1, rate) / elapsed)

    # ---------------------------------------------------------------- being served

    def head(self, now: float) -> W | None:
        """Who goes next; stays so until something is charged, added or taken."""
        if self._front:
            return next(iter(self._front))
        account = self._next_account(now)
        return next(iter(account.line)) if account is not None else None

    def in_front(self, item: W) -> bool:
        return item in self._front

    def take(self, item: W, now: float, seats: int = 1) -> None:
        """`item` leaves the line and runs, on so many seats."""
        account = item.account
        account.seats += seats
        if item in self._front:
            del self._front[item]
            return
        self._class(account).serve(account.cost, now)
        self._leave_line(item)
        self._sampled += 1
        elapsed = now - self._sampled_from
        if elapsed >= _SAMPLE_S:
            fresh = self._sampled / elapsed
            self._rate = fresh if self._rate == 0 else (self._rate + fresh) / 2
            self._sampled_from, self._sampled = now, 0

    def remove(self, item: W) -> bool:
        """`item` gives up; False if it was not here."""
        if item in self._front:
            del self._front[item]
        elif item in item.account.line:
            self._leave_line(item)
        else:
            return False
        return True

    def holders(self) -> Iterator[W]:
        """Those in front, the last first: only they can hold anything while they wait."""
        return reversed(self._front)

    def shared(self, now: float) -> bool:
        """Whether more than one key was heard of in the last minute."""
        while self._recent and now - next(iter(self._recent.values())) > _LATELY_S:
            self._recent.popitem(last=False)
        return len(self._recent) > 1

    def charge(self, account: Account, cost: float, now: float) -> None:
        """What a request of `account` cost, in computed prompt tokens."""
        account.charge(cost, now)
        self._everybody.charge(cost, now)

    def floods(self, account: Account, now: float) -> bool:
        """Whether the key wants more than _FLOOD times what the others want on the average. Never with one request."""
        others = len(self._recent) - 1
        if others < 1 or account.seats + len(account.line) < 2:
            return False
        mine = account.used_lately(now) + account.tokens
        return mine * (others + _FLOOD) > _FLOOD * (self._everybody.used_lately(now) + self.tokens)

    # ---------------------------------------------------------------- inside

    def _leave_line(self, item: W) -> None:
        account = item.account
        _, tokens = account.line.pop(item)
        account.tokens -= tokens
        self._waiting -= 1
        self.tokens -= tokens
        self._lines -= not account.line

    def _next_account(self, now: float) -> Account | None:
        best: Account | None = None
        rank = 0.0
        for priority, kind in self._classes.items():
            account = self._least(kind)
            if account is None:
                continue
            mine = self._rank(priority, account, now)
            if best is None or mine < rank:
                best, rank = account, mine
        return best

    def _rank(self, priority: int, account: Account, now: float) -> float:
        aging_s = self.limits.priority_aging_s
        if aging_s is None:
            return priority
        came, _ = next(iter(account.line.values()))
        return priority - (now - came) / aging_s

    def _least(self, kind: _Class) -> Account | None:
        heap = kind.heap
        while heap:
            cost, number, account = heap[0]
            if not account.line:
                account.listed = False
                heapq.heappop(heap)
            elif cost < account.cost:
                heapq.heapreplace(heap, (account.cost, number, account))
            else:
                return account
        return None

    def _list(self, account: Account) -> None:
        if not account.listed:
            account.listed = True
            heapq.heappush(self._class(account).heap, (account.cost, next(self._numbers), account))

    def _class(self, account: Account) -> _Class:
        return self._classes.setdefault(account.priority, _Class())

    def _account(self, request: GenerateRequest) -> Account:
        name = request.priority, request.fair_key
        account = self._accounts.get(name)
        if account is None:
            if len(self._accounts) >= self._sweep_at:
                self._sweep()
            account = self._accounts[name] = Account(*name)
        return account

    def _sweep(self) -> None:
        """Forget who has nothing here, those who had least first; all of them where they would start anew anyway."""
        idle = [a for a in self._accounts.values() if not a.line and not a.seats]
        owing = [a for a in idle if a.cost > self._class(a).virtual]
        owing.sort(key=lambda account: account.cost - self._class(account).virtual, reverse=True)
        kept = set(map(id, owing[:_IDLE_ACCOUNTS]))
        for account in idle:
            if id(account) not in kept:
                del self._accounts[account.priority, account.key]
        self._sweep_at = 2 * max(len(self._accounts), _IDLE_ACCOUNTS)

    def _hear(self, key: str, now: float) -> None:
        self._recent[key] = now
        self._recent.move_to_end(key)
        self.shared(now)
