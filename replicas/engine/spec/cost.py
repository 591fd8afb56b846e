"""What a step costs by its number of rows, measured: once at start, then by every step that runs; what asking costs."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

_KNOTS = np.array(
    [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048], dtype=float
)
_KNOT_LIST = _KNOTS.tolist()
PROBED, FEW = (1, 2, 4, 8, 16, 32), 8  # the few are measured however long it takes
_SCALE_WEIGHT, _SHAPE_WEIGHT = 0.1, 0.02
_ASKED_WEIGHT = 0.1
_OUTLIER = 3.0  # a step that took so many times what was expected tells of the machine, not of its rows


class StepCost:
    """A shape (relative seconds by rows, which changes slowly) times a scale (how fast the machine is just now).

    Comparing steps of different length therefore does not depend on whether something else ran meanwhile.
    """

    def __init__(self) -> None:
        self._shape: NDArray[np.float64] = 1.0 + 0.05 * (_KNOTS - 1)
        self.scale = 0.0  # seconds of a step of one row

    def calibrate(self, seconds: dict[int, float]) -> None:
        """`seconds` by rows, at least for one row; sizes that were not measured are interpolated.

        Past the largest a row costs what one of the last stretch did; if there was no time for all of PROBED, at least
        what its rows cost on average: a busy machine's last stretch says little.
        """
        rows = sorted(seconds)
        times = np.maximum.accumulate([seconds[r] for r in rows])
        self.scale = float(times[0])
        known = np.array(rows, dtype=float)
        self._shape = np.interp(_KNOTS, known, times / self.scale)
        if len(rows) > 1:
            slope = (times[-1] - times[-2]) / (known[-1] - known[-2]) / self.scale
            if rows[-1] < PROBED[-1]:
                slope = max(slope, times[-1] / known[-1] / self.scale)
            beyond = _KNOTS > known[-1]
            self._shape[beyond] = times[-1] / self.scale + slope * (_KNOTS[beyond] - known[-1])

    def record(self, seconds: float, rows: int) -> None:
        expected = self.relative(rows, 0)[0]
        if self.scale == 0:
            self.scale = seconds / expected
        ratio = seconds / (self.scale * expected)
        if ratio < _OUTLIER:
            at = min(bisect_left(_KNOT_LIST, rows), len(_KNOTS) - 1)
            # For more rows too, of which nothing was seen: what these took longer (long contexts, sampling) those would
            # as well. Else more rows than usual would seem to cost less than they do.
            self._shape[at:] += _SHAPE_WEIGHT * (ratio - 1) * self._shape[at]
            # What was thought of them may now be less than what fewer rows were seen to cost.
            self._shape[at:] = np.maximum(self._shape[at:], self._shape[at])
            self.scale, self._shape = self.scale * float(self._shape[0]), self._shape / self._shape[0]
        self.scale *= 1 + _SCALE_WEIGHT * (min(ratio, _OUTLIER) - 1)

    def relative(self, rows: int, more: int) -> NDArray[np.float64]:
        """Cost of steps of rows, rows + 1, … rows + more rows, in steps of one row; never falling."""
        at = np.arange(max(rows, 1), max(rows, 1) + more + 1, dtype=float)
        shape = np.maximum.accumulate(self._shape)
        cost: NDArray[np.float64] = np.interp(at, _KNOTS, shape)
        if at[-1] > _KNOTS[-1]:
            beyond = at > _KNOTS[-1]
            cost[beyond] = shape[-1] * at[beyond] / _KNOTS[-1]
        return cost


class AskingCost:
    """Seconds that a proposer takes for all sequences at once: for the first guess, which has to catch up with them and
    finds its weights washed out of the caches, and for each further one.
    """

    def __init__(self) -> None:
        self.first_s = self.further_s = 0.0

    def record(self, seconds: float, depth: int) -> None:
        if not self.first_s:
            self.first_s = self.further_s = seconds / depth
            return
        # A step of normalised least mean squares: both parts bear the error as far as they had a part in it.
        further = depth - 1
        error = seconds - self.first_s - self.further_s * further
        step = _ASKED_WEIGHT * error / (1 + further**2)
        self.first_s = max(self.first_s + step, 1e-9)
        self.further_s = max(self.further_s + step * further, 0.0)

    def seconds(self, depth: int) -> NDArray[np.float64]:
        """For 0, 1, … `depth` guesses."""
        count = np.arange(depth + 1, dtype=float)
        return np.where(count > 0, self.first_s + self.further_s * (count - 1), 0.0)
