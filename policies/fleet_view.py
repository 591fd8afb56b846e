"""What a gateway knows of a model's replicas at the moment of a decision. No I/O, no clock.

    loads = FleetLoads("gateway-1", prefixes=PrefixIndex())
    loads.report(status)                                     # whenever a replica publishes
    decision = policy(request, loads.view(), now, rng)
    loads.sent(request, decision, seq)                       # the submission's sequence number on that connection
    loads.ended(decision.replica_id)                         # its stream is over, however it ended

Numbers are kept as columns over the replicas, so that a policy scores all of them with a few vector operations. What
was sent and is not yet in a replica's own numbers (its `admitted` echo says so) is counted on top: a burst never piles
onto the replica that reported idle last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt

from policies.prefix_history import HistoryIndex
from policies.prefix_index import Counts, PrefixIndex, PrefixSource
from replicas.protocol import ReplicaState, ReplicaStatus, RouteDecision

Column = npt.NDArray[np.float64]

# Columns of the reported numbers, then of what was sent since.
_REPORTED = (
    "num_requests_running",
    "num_requests_waiting",
    "queued_tokens",
    "kv_blocks_total",
    "kv_blocks_free",
    "prefill_rate",
    "decode_step_s",
    "block_release_rate",
)
_COLUMNS = (*_REPORTED, "sent_requests", "sent_tokens", "sent_blocks", "in_flight")
# The column of each number.
NUMBER = {name: number for number, name in enumerate(_COLUMNS)}
_SENT = NUMBER["sent_requests"]
_IN_FLIGHT = NUMBER["in_flight"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRequest:
    """What a policy may know of a prompt: its length, the hashes of its full blocks, and how much may come after it."""

    request_id: str
    prompt_tokens: int
    hashes: tuple[bytes, ...]
    block_size: int
    max_tokens: int = 0

    @property
    def num_blocks(self) -> int:
        return -(-self.prompt_tokens // self.block_size)

    @property
    def most_cached(self) -> int:
        """Blocks that a cache may spare it: not the last token, which must be computed to have logits."""
        return max(self.prompt_tokens - 1, 0) // self.block_size


@dataclass(frozen=True, slots=True, eq=False)
class FleetView:
    """Columns over the replicas, valid until the next change of the FleetLoads it came from.

    eligible: bool; the others may not be chosen (draining, lost, or tried already).
    turn: decisions of this gateway so far.
    history: what was sent where, if the gateway keeps it.
    """

    replica_ids: tuple[str, ...]
    eligible: npt.NDArray[np.bool_]
    columns: npt.NDArray[np.float64]
    turn: int
    prefixes: PrefixSource
    history: HistoryIndex | None = None
    generation: int = 0

    def column(self, name: str) -> Column:
        return cast(Column, self.columns[NUMBER[name]])

    @property
    def requests(self) -> Column:
        """Running, waiting and sent since."""
        return cast(Column, self.columns[0] + self.columns[1] + self.columns[_SENT])

    @property
    def queued_tokens(self) -> Column:
        """Prompt tokens that must be computed before those of a request sent now."""
        return self.column("queued_tokens") + self.column("sent_tokens")

    def cached_tokens(self, request: RouteRequest, source: PrefixSource | None = None) -> Counts:
        """Prompt tokens each replica need not compute."""
        blocks = (source or self.prefixes).leading(request.hashes, self.replica_ids)
        tokens: Counts = np.minimum(blocks, request.most_cached) * request.block_size
        return tokens

    def cached_tokens_of_few(self, request: RouteRequest) -> list[int]:
        """The same as a list, for a few replicas."""
        if not isinstance(self.prefixes, PrefixIndex):
            return [int(count) for count in self.cached_tokens(request)]
        blocks = self.prefixes.leading_few(request.hashes, self.replica_ids)
        return [min(count, request.most_cached) * request.block_size for count in blocks]


@dataclass(slots=True)
class _Row:
    """One incarnation: its column, and (sequence number, tokens, blocks) of what it has not echoed, oldest first."""

    incarnation: str
    number: int
    ready: bool = True
    admitted: int = 0
    sent: deque[tuple[int, int, int]] = field(default_factory=deque)


class FleetLoads:
    """The replicas of one model as one gateway sees them. Not thread-safe."""

    def __init__(
        self, gateway_id: str, *, prefixes: PrefixSource | None = None, history: HistoryIndex | None = None
    ) -> None:
        self.gateway_id = gateway_id
        self.prefixes: PrefixSource = prefixes if prefixes is not None else PrefixIndex()
        self.history = history
        self.turn = 0
        self._rows: dict[str, _Row] = {}
        self._ids: tuple[str, ...] = ()
        self._keep(np.zeros((len(_COLUMNS), 0)))
        self._eligible = np.zeros(0, np.bool_)

    # ---------------------------------------------------------------- replicas come, report and go

    def join(self, replica_id: str, incarnation: str) -> None:
        """A replica is reachable; nothing is known of its load. Another incarnation begins from nothing."""
        row = self._rows.get(replica_id)
        if row is None:
            self._rows[replica_id] = _Row(incarnation, len(self._ids))
            self._ids = (*self._ids, replica_id)
            self._keep(np.hstack((self._columns, np.zeros((len(_COLUMNS), 1)))))
            self._eligible = np.append(self._eligible, np.True_)
        elif row.incarnation != incarnation:
            self._rows[replica_id] = _Row(incarnation, row.number)
            self._columns[:, row.number] = 0
            self._eligible[row.number] = True

    def leave(self, replica_id: str) -> None:
        """The replica is lost or dismissed; unknown names are no error."""
        gone = self._rows.pop(replica_id, None)
        if gone is None:
            return
        self._ids = tuple(name for name in self._ids if name != replica_id)
        self._keep(np.delete(self._columns, gone.number, axis=1))
        self._eligible = np.delete(self._eligible, gone.number)
        for row in self._rows.values():
            row.number -= row.number > gone.number

    def _keep(self, columns: npt.NDArray[np.float64]) -> None:
        self._columns = columns
        # The same memory, several times as fast as numpy for single numbers.
        self._numbers = cast("memoryview[float]", columns.data)

    def _count(self, replica: int, first: int, *amounts: int) -> None:
        """Add to so many columns of one replica, from column `first` on."""
        numbers = self._numbers
        for column, amount in enumerate(amounts, first):
            numbers[column, replica] += amount

    def report(self, status: ReplicaStatus) -> None:
        """Take a replica's own numbers; a status of an incarnation that did not join is dropped."""
        stats = status.stats
        numbers = (
            stats.num_requests_running,
            stats.num_requests_waiting,
            stats.queued_tokens,
            stats.kv_blocks_total,
            stats.kv_blocks_free,
            stats.prefill_rate,
            stats.decode_step_s,
            stats.block_release_rate,
        )
        ready, admitted = status.state is ReplicaState.READY, status.admitted.get(self.gateway_id, 0)
        self.heard(status.replica_id, status.incarnation, numbers, ready=ready, admitted=admitted)

    def heard(
        self, replica_id: str, incarnation: str, numbers: tuple[float, ...], *, ready: bool, admitted: int
    ) -> None:
        """`report` of what it comes to: the reported columns in their order, the last of our submissions in them."""
        row = self._rows.get(replica_id)
        if row is None or row.incarnation != incarnation:
            return
        column = self._columns[:, row.number]
        column[:_SENT] = numbers
        row.ready = ready
        self._eligible[row.number] = ready
        row.admitted = max(row.admitted, admitted)
        while row.sent and row.sent[0][0] <= row.admitted:
            _, tokens, blocks = row.sent.popleft()
            self._count(row.number, _SENT, -1, -tokens, -blocks)

    # ---------------------------------------------------------------- what this gateway does

    def view(self, avoid: Collection[str] = (), generation: int = 0) -> FleetView:
        """The fleet now; replicas in `avoid` are not eligible."""
        eligible = self._eligible
        if avoid:
            eligible = eligible & np.array([name not in avoid for name in self._ids], np.bool_)
        return FleetView(self._ids, eligible, self._columns, self.turn, self.prefixes, self.history, generation)

    def sent(self, request: RouteRequest, decision: RouteDecision, seq: int) -> None:
        """The request went out as submission `seq` of this gateway to the chosen replica (counting from 1)."""
        self.turn += 1
        if self.history is not None:
            self.history.record(decision.replica_id, request.hashes)
        row = self._rows.get(decision.replica_id)
        if row is None:
            return  # lost between the decision and now
        self._count(row.number, _IN_FLIGHT, 1)
        if seq > row.admitted:
            row.sent.append((seq, decision.uncached_tokens, decision.new_blocks))
            self._count(row.number, _SENT, 1, decision.uncached_tokens, decision.new_blocks)

    def ended(self, replica_id: str, incarnation: str | None = None) -> None:
        """One request of this gateway to the replica is over; of another incarnation it no longer counts."""
        row = self._rows.get(replica_id)
        if row is not None and incarnation in (None, row.incarnation):
            self._count(row.number, _IN_FLIGHT, -1)

    def unechoed(self, replica_id: str) -> Sequence[int]:
        """Sequence numbers sent that no report includes yet."""
        row = self._rows.get(replica_id)
        return [seq for seq, _, _ in row.sent] if row else []
