"""What every room's tests may share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Triton's kernels are interpreted in tests, on any machine. Read when triton is imported, which transformers does.
os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The embedded default model's folder, fetched once into the user's cache (`signalbox models pull`)."""
    from deploy.models import resolve

    return resolve("smollm2-135m-instruct")
