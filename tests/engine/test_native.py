"""Building and loading the kernels: cached, racing, broken, absent, switched off."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from replicas.engine import native
from replicas.engine.native import compiler
from tests.engine.native_builds import needs_compiler


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a module that has not tried to load anything yet."""
    monkeypatch.setenv("SIGNALBOX_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_loaded", None)
    monkeypatch.setattr(native, "_reason", None)
    monkeypatch.setattr(compiler, "FLAGS", ("-O0", *compiler.FLAGS[1:]))  # compiled in a second
    yield tmp_path
    assert not [path for path in tmp_path.rglob("*") if path.is_dir() and path.name != "native"], "scratch left behind"


@needs_compiler
def test_racing_builds_agree_and_a_second_one_finds_the_cache(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: compiler.build(), range(2))
    assert first == second
    assert [*fresh.rglob("*.so")] == [first]
    monkeypatch.setattr(compiler, "_compile", lambda *args: pytest.fail("compiled again"))
    assert compiler.build() == first


@needs_compiler
def test_flags_sources_and_target_change_the_key(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {compiler._key("g++", "native", None), compiler._key("g++", "x86-64", None)}
    monkeypatch.setattr(compiler, "FLAGS", ("-O1",))
    keys.add(compiler._key("g++", "native", None))
    monkeypatch.setattr(compiler, "SOURCES", compiler.SOURCES[:1])
    keys.add(compiler._key("g++", "native", None))
    assert len(keys) == 4


def test_without_a_compiler_torch_takes_over_and_it_is_said_once(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert native.library() is None
        assert native.library() is None
    assert "no-such-compiler" in native.why_not()
    assert len(caplog.records) == 1


@needs_compiler
def test_a_source_that_does_not_compile_is_a_reason_not_a_crash(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "native"
    broken.mkdir()
    (broken / "broken.cpp").write_text("int main( {")
    monkeypatch.setattr(compiler, "SOURCE_DIR", broken)
    monkeypatch.setattr(compiler, "SOURCES", ("broken.cpp",))
    assert native.library() is None
    assert "exit status 1" in native.why_not()


def test_a_cache_that_cannot_be_written_is_a_reason_not_a_crash(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CXX", sys.executable)  # anything that answers --version
    monkeypatch.setenv("SIGNALBOX_CACHE", str(tmp_path / "file"))
    assert native.library() is None
    assert "cannot write the kernel cache" in native.why_not()


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SIGNALBOX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.cache_dir() == tmp_path / "signalbox"
    monkeypatch.setenv("SIGNALBOX_CACHE", str(tmp_path / "other"))
    assert compiler.cache_dir() == tmp_path / "other"


@needs_compiler
def test_kernels_and_torch_share_one_openmp_runtime() -> None:
    script = (
        "import torch; from replicas.engine.native import library; from replicas.engine.native.ops import NativeOps\n"
        "torch.mm(torch.ones(500, 500), torch.ones(500, 500))\n"
        "NativeOps(library()).linear(torch.ones(500, 500), None)(torch.ones(2, 500))\n"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line or 'libomp' in line}))\n"
        "print(len(__import__('os').listdir('/proc/self/task')))"
    )
    runtimes, os_threads = subprocess.check_output([sys.executable, "-c", script], text=True).split()
    assert runtimes == "1"
    assert int(os_threads) <= 2 + __import__("os").cpu_count()


def test_the_command_says_where_the_library_is_or_why_there_is_none() -> None:
    command = [sys.executable, "-m", "replicas.engine.native"]
    env = {"SIGNALBOX_NATIVE": "0", "PATH": "/usr/bin"}
    absent = subprocess.run([*command, "--require"], capture_output=True, text=True, env=env)
    assert absent.returncode == 1
    assert "SIGNALBOX_NATIVE=0" in absent.stderr
    assert subprocess.run(command, capture_output=True, text=True, env=env).returncode == 0
