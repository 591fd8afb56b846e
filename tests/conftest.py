"""What every room's tests may share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The embedded default model's folder, fetched once into the user's cache (`signalbox models pull`)."""
    from deploy.models import resolve

    return resolve("smollm2-135m-instruct")
