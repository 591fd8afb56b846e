"""Which replica probably holds which prefix: what we sent there ourselves. No I/O, no clock."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from policies.prefix_index import Counts


class HistoryIndex:
    """What we sent where, for upstreams that publish nothing: a guess that forgets what was sent longest ago.

    `max_blocks` per replica should be near what the upstream can cache. Also the tree of the cache_aware policy.
    """

    def __init__(self, max_blocks: int) -> None:
        assert max_blocks > 0, "a history of no blocks remembers nothing"
        self._max_blocks = max_blocks
        self._sent: dict[str, OrderedDict[bytes, None]] = {}

    def record(self, replica_id: str, hashes: Sequence[bytes]) -> None:
        """A prompt went to the replica. Its first blocks count as the most recent: tails are forgotten first."""
        sent = self._sent.setdefault(replica_id, OrderedDict())
        for digest in reversed(hashes):
            sent[digest[:8]] = None
            sent.move_to_end(digest[:8])
        while len(sent) > self._max_blocks:
            sent.popitem(last=False)

    def leading(self, hashes: Sequence[bytes], replica_ids: tuple[str, ...]) -> Counts:
        counts = np.zeros(len(replica_ids), np.int64)
        keys = [digest[:8] for digest in hashes]
        for number, replica_id in enumerate(replica_ids):
            sent = self._sent.get(replica_id)
            if sent:
                counts[number] = next((i for i, key in enumerate(keys) if key not in sent), len(keys))
        return counts

    def sizes(self, replica_ids: tuple[str, ...]) -> Counts:
        """Blocks remembered of each replica."""
        return np.array([len(self._sent.get(replica_id, ())) for replica_id in replica_ids], np.int64)

    def drop(self, replica_id: str) -> None:
        self._sent.pop(replica_id, None)
