"""Kernels overlap only where that was seen to change nothing and to be faster."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest
import torch
from triton.errors import TritonError

from replicas.engine.graphs import EagerGraph
from replicas.engine.triton.overlap import choose_overlap, options, overlap

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def early() -> bool:
    return bool(options()["EARLY"])


def timed(plain: float, overlapping: float) -> Callable[[Callable[[], None]], float]:
    """In place of a device's clock."""
    left = [plain, overlapping]

    def seconds(call: Callable[[], None]) -> float:
        call()
        return left.pop(0)

    return seconds


def stay(i: int) -> None:
    """The same step again."""


def same() -> torch.Tensor:
    return torch.arange(5.0)


def test_what_is_faster_and_the_same_is_taken() -> None:
    seen: list[bool] = []

    def compute() -> torch.Tensor:
        seen.append(early())
        return same()

    assert choose_overlap(compute, stay, EagerGraph, CUDA, timed(1.0, 0.9))
    assert seen == sorted(seen), "one way after the other"
    assert set(seen) == {False, True}
    assert not early(), "what was tried is still on"


@pytest.mark.parametrize("overlapping", [1.0, 0.995, 1.2])
def test_what_is_no_faster_is_not(overlapping: float) -> None:
    assert not choose_overlap(same, stay, EagerGraph, CUDA, timed(1.0, overlapping))


def test_other_results_are_never_taken(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[bool] = []

    def compute() -> torch.Tensor:
        calls.append(early())
        late_in_a_race = early() and len(calls) % 5 == 0
        return same() + late_in_a_race

    with caplog.at_level(logging.WARNING):
        assert not choose_overlap(compute, stay, EagerGraph, CUDA, timed(1.0, 0.5))
    assert "results differ" in caplog.text


def test_what_is_read_too_early_is_not_taken_for_right() -> None:
    """On the same step again and again the cache holds the right numbers before they are written."""
    cache, token = torch.zeros(1), torch.zeros(1)

    def compute() -> torch.Tensor:
        before = cache.clone()
        cache.copy_(token)
        return before if early() else cache.clone()

    assert choose_overlap(compute, stay, EagerGraph, CUDA, timed(1.0, 0.5)), "the test shows nothing"
    assert not choose_overlap(compute, lambda i: token.fill_(i) and None, EagerGraph, CUDA, timed(1.0, 0.5))


@pytest.mark.parametrize("kind", [RuntimeError, TritonError])
def test_a_device_that_refuses_is_asked_no_further(kind: type[Exception]) -> None:
    def compute() -> torch.Tensor:
        if early():
            raise kind("invalid argument")
        return same()

    assert not choose_overlap(compute, stay, EagerGraph, CUDA, timed(1.0, 0.5))
    assert not early()


def test_it_is_tried_on_hopper_with_recorded_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute() -> torch.Tensor:
        raise AssertionError("tried where it cannot be")

    assert not choose_overlap(compute, stay, EagerGraph, torch.device("cpu"))
    assert not choose_overlap(compute, stay, None, CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert not choose_overlap(compute, stay, EagerGraph, CUDA)


def test_one_threads_launches_are_no_others() -> None:
    elsewhere: list[bool] = []
    with overlap(True):
        assert options() == {"EARLY": True, "launch_pdl": True}
        thread = threading.Thread(target=lambda: elsewhere.append(early()))
        thread.start()
        thread.join()
        with overlap(False):
            assert not early()
        assert early()
    assert elsewhere == [False]
    assert options() == {"EARLY": False}
