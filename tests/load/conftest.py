"""Null servers in processes of their own, stopped at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from load.scripted import null_server

Start = Callable[..., str]


@pytest.fixture(scope="session")
def null() -> Iterator[Start]:
    """Start a null server with these options, or find the one that has them; its base URL."""
    running: dict[tuple[str, ...], str] = {}
    with ExitStack() as stack:

        def start(*options: str) -> str:
            if options not in running:
                running[options] = stack.enter_context(null_server(*options))
            return running[options]

        yield start
