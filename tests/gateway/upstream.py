"""A misbehaving server for tests: import the fixture `mock`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from replicas.mock_upstream import MockUpstream


@pytest.fixture
def mock() -> Iterator[MockUpstream]:
    """In a thread of its own; no socket may be left open at the end."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = MockUpstream()
    asyncio.run_coroutine_threadsafe(server.start(), loop).result(5)
    yield server
    asyncio.run_coroutine_threadsafe(server.stop(), loop).result(5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
