"""Everything here needs triton, which there is for linux on x86-64 and arm64 only."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="needs triton: pip install -e '.[test]' on linux")
