"""Extremely randomised trees for many outputs at once (Geurts, Ernst & Wehenkel 2006), in numpy.

At a node a few features are drawn, each with one threshold drawn evenly between its extremes; the pair that leaves the
least squared error over all outputs together splits. All trees lie behind each other in flat arrays:

    node      0 .. n0-1 | n0 .. n0+n1-1 | …      children are absolute; a leaf is its own two children
    roots     0           n0              …
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Forest:
    """feature, left, right: int32 [nodes]; threshold: float32 [nodes]; value: float32 [nodes, outputs]; roots [trees].

    `depth` is the longest path, so that a walk of that many steps has reached every leaf.
    """

    feature: NDArray[np.int32]
    threshold: NDArray[np.float32]
    left: NDArray[np.int32]
    right: NDArray[np.int32]
    value: NDArray[np.float32]
    roots: NDArray[np.int32]
    depth: int

    def predict(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Mean of the leaves that each row falls into: [n, features] -> [n, outputs]."""
        start = np.arange(len(rows))[:, None] * rows.shape[1]
        flat = rows.ravel()
        at = np.broadcast_to(self.roots, (len(rows), len(self.roots)))
        for _ in range(self.depth):
            goes_left = flat.take(start + self.feature.take(at)) <= self.threshold.take(at)
            at = np.where(goes_left, self.left.take(at), self.right.take(at))
        mean: NDArray[np.float32] = self.value[at].mean(axis=1, dtype=np.float32)
        return mean


def grow(
    rows: NDArray[np.float32],
    targets: NDArray[np.float32],
    *,
    trees: int,
    leaf: int,
    rng: np.random.Generator,
    share: float = 0.3,
) -> Forest:
    """Grow a forest on [n, features] and [n, outputs]; no leaf holds fewer than `leaf` rows.

    share: part of the features that are drawn at each node.
    """
    feature: list[int] = []
    threshold: list[float] = []
    children: list[tuple[int, int]] = []
    value: list[NDArray[np.float32]] = []
    roots, deepest = [], 0
    drawn = max(1, round(share * rows.shape[1]))
    for _ in range(trees):
        roots.append(len(feature))
        waiting = [(np.arange(len(rows)), -1, False, 0)]
        while waiting:
            members, parent, is_left, depth = waiting.pop()
            here, deepest = len(feature), max(deepest, depth)
            feature.append(0)
            threshold.append(0.0)
            children.append((here, here))
            value.append(targets[members].mean(axis=0))
            if parent >= 0:
                left, right = children[parent]
                children[parent] = (here, right) if is_left else (left, here)
            split = _split(rows, targets, members, leaf, drawn, rng)
            if split is not None:
                feature[here], threshold[here], mask = split
                waiting += [(members[mask], here, True, depth + 1), (members[~mask], here, False, depth + 1)]
    links = np.array(children, np.int32)
    return Forest(
        np.array(feature, np.int32),
        np.array(threshold, np.float32),
        links[:, 0].copy(),
        links[:, 1].copy(),
        np.array(value, np.float32),
        np.array(roots, np.int32),
        deepest,
    )


def _split(
    rows: NDArray[np.float32],
    targets: NDArray[np.float32],
    members: NDArray[np.intp],
    leaf: int,
    drawn: int,
    rng: np.random.Generator,
) -> tuple[int, float, NDArray[np.bool_]] | None:
    """The best of `drawn` random (feature, threshold) pairs and who goes left; None where the node stays a leaf."""
    size = len(members)
    if size < 2 * leaf:
        return None
    features = rng.choice(rows.shape[1], drawn, replace=False)
    part = rows[members[:, None], features]
    low, high = part.min(axis=0), part.max(axis=0)
    cuts = (low + rng.random(drawn, dtype=np.float32) * (high - low)).astype(np.float32)
    goes_left = part <= cuts
    left = goes_left.sum(axis=0)
    allowed = (left >= leaf) & (size - left >= leaf)
    if not allowed.any():
        return None
    of_node = targets[members]
    sums = goes_left.T.astype(np.float32) @ of_node
    rest = of_node.sum(axis=0) - sums
    # Least squared error = largest sum of squared sums over sizes.
    gain = (sums**2).sum(axis=1) / np.maximum(left, 1) + (rest**2).sum(axis=1) / np.maximum(size - left, 1)
    best = int(np.where(allowed, gain, -np.inf).argmax())
    return int(features[best]), float(cuts[best]), goes_left[:, best]
