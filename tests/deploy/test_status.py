"""What `signalbox status` shows a person."""

from __future__ import annotations

import pytest

from deploy.front import show


def test_kernels_and_why_they_were_taken_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    backends = "attention triton (no flash_attn: not installed), ops triton, weights in full"
    stats = {"num_requests_running": 1, "kv_blocks_total": 8, "kv_blocks_free": 3, "generation_tokens": 5}
    replica = {"model": "qwen", "id": "qwen#1", "state": "ready", "stats": stats, "backends": backends}
    gone = {"model": "qwen", "id": "qwen#2", "state": "unreachable", "error": "no answer"}
    show(
        {
            "endpoint": "http://127.0.0.1:8000/v1",
            "state": "ready",
            "detail": "",
            "fleet": "fleet.yaml",
            "pid": 1,
            "log": "log",
            "deployments": [],
            "replicas": [replica, gone],
        }
    )
    shown = " ".join(capsys.readouterr().out.split())
    assert f"qwen#1: {backends}" in shown
    assert "5/8" in shown
    assert "qwen#2:" not in shown
