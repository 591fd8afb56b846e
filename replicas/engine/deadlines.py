"""Which requests are too late: by request id, in order of the instant after which nobody wants their answers."""

from __future__ import annotations

import heapq

from replicas.protocol import DeadlineExceeded


class Deadlines:
    """Instants are those of whatever clock the caller uses. O(log n) an operation, amortised."""

    def __init__(self) -> None:
        self._at: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []  # may hold entries of requests that ended in time

    def __len__(self) -> int:
        return len(self._at)

    def add(self, request_id: str, at: float) -> None:
        self._at[request_id] = at
        heapq.heappush(self._heap, (at, request_id))
        if len(self._heap) > 2 * len(self._at) + 64:
            self._heap = [(at, request_id) for request_id, at in self._at.items()]
            heapq.heapify(self._heap)

    def get(self, request_id: str) -> float | None:
        return self._at.get(request_id)

    def discard(self, request_id: str) -> None:
        """The request ended; unknown ids are fine."""
        self._at.pop(request_id, None)

    def next(self) -> float | None:
        """The earliest instant at which somebody will be too late."""
        while self._heap and self._at.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def take_late(self, now: float) -> list[str]:
        """Requests whose instant has come, the earliest first; they are forgotten here."""
        late = []
        while (at := self.next()) is not None and at <= now:
            late.append(heapq.heappop(self._heap)[1])
            del self._at[late[-1]]
        return late


def too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the request was not finished within its time limit")
