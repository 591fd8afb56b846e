"""Budgets and gateway deaths on a real instance: the short form of `python -m load.check_budgets`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from load.check_budgets import main


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_caps_hold_and_killed_gateways_are_billed_exactly_once(tmp_path: Path) -> None:
    """4 x 200 requests against budgets for 50; three gateways killed under load, every request recounted."""
    report = tmp_path / "report.json"
    status = main(["--database", "sqlite", "--kills", "3", "--json", str(report)])
    assert status < 2, "it could not begin or go on"
    (found,) = json.loads(report.read_text())
    assert found["violations"] == []
    assert status == 0
    assert [burst["answers"] for burst in found["bursts"]] == [{"200": 50, "429 insufficient_quota": 150}] * 4
    assert found["looks"] > 100
    assert sum(made["by_journal"] for made in found["rounds"]) > 0
