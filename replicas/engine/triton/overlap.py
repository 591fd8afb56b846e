"""Kernels that begin while the one in front of them ends (programmatic dependent launch, compute capability 9.0).

In a small step a layer is ten short kernels, and between one's last program and the next one's first the device has
nothing to do. A kernel that is launched so gets its programs in place before, may ask for weights, which nobody writes,
and then waits until all that was launched before it is done and seen. As every kernel waits, a kernel may rely on
everything in front of the one in front of it too.

Whether it is right and pays is tried on the device (`choose_overlap`): on the same steps, recorded both ways.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from replicas.engine.graphs import Graph
from replicas.engine.triton.device import seconds_of

logger = logging.getLogger(__name__)

_LEAST_CAPABILITY = (9, 0)
_LEAST_GAIN = 0.01
_REPLAYS, _TRIES = 8, 9


class _State(threading.local):
    on = False


_state = _State()


@contextmanager
def overlap(on: bool) -> Iterator[None]:
    """Launches of this thread inside overlap, or do not."""
    before, _state.on = _state.on, on
    try:
        yield
    finally:
        _state.on = before


def options() -> dict[str, Any]:
    """What a launch of a kernel that can begin early is given beside its own constants."""
    return {"EARLY": True, "launch_pdl": True} if _state.on else {"EARLY": False}


def choose_overlap(
    compute: Callable[[], Tensor],
    turn: Callable[[int], None],
    make_graph: Callable[[], Graph] | None,
    device: torch.device,
    seconds: Callable[[Callable[[], None]], float] | None = None,
) -> bool:
    """Whether recorded steps should overlap: if that gives the same bits, time after time, and is faster.

    compute: a small step on memory that nobody uses -> its results. turn(i): makes it another step than the one before,
    on the same memory: what a kernel reads too early is then wrong, not left over from before. seconds: times a call;
    None: on the device.
    """
    if make_graph is None or device.type != "cuda" or torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return False
    try:
        times, results = [], []
        for on in (False, True):
            graph, kept = _recorded(compute, make_graph(), on)
            found = []
            for i in range(_REPLAYS):
                turn(i)
                graph.replay()
                found.append(kept[0].clone())
            results.append(found)
            times.append(seconds(graph.replay) if seconds else seconds_of(graph.replay, _TRIES))
    except Exception as error:  # Triton's own are no RuntimeErrors
        logger.warning("kernels do not overlap: %s", error)
        return False
    same = all(map(torch.equal, *results))
    plain, early = times
    logger.info("a step of one token takes %.3f ms, %.3f with overlapping kernels", 1e3 * plain, 1e3 * early)
    if not same:
        logger.warning("kernels do not overlap: results differ when they do")
    return same and early < (1 - _LEAST_GAIN) * plain


def _recorded(compute: Callable[[], Tensor], graph: Graph, on: bool) -> tuple[Graph, list[Tensor]]:
    kept: list[Tensor] = []

    def work() -> None:
        with overlap(on):
            result = compute()
        if kept:
            kept[0].copy_(result)
        else:
            kept.append(result.clone())

    work()  # compiles, and makes room for the results outside of the graph's memory
    graph.record(work)
    return graph, kept
