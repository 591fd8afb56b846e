"""Compile the kernels and keep the result in the user's cache, keyed by everything that could change it.

    <cache>/native/<hash of sources, flags, compiler and CPU>.so

Builds happen in a temporary directory and arrive by an atomic rename, so processes may race: the last one wins with
identical content. The library is linked against the OpenMP runtime that torch brings, by its soname, so that the
process has one thread pool and not two.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE_DIR = Path(__file__).parent
SOURCES = ("gemm.cpp", "attention.cpp", "elementwise.cpp", "stack.cpp", "chain.cpp")
# No -ffast-math: kernels mask with infinities. Contraction to fused multiply-adds is what "one chain" means in simd.h.
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast")
COMPILE_TIMEOUT_S = 300


class BuildError(Exception):
    """No compiler, or it refused; the message says which and why."""


def cache_dir() -> Path:
    """SIGNALBOX_CACHE, else XDG_CACHE_HOME/signalbox, else ~/.cache/signalbox."""
    if explicit := os.environ.get("SIGNALBOX_CACHE"):
        return Path(explicit).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "signalbox"


def build(march: str = "native") -> Path:
    """Path of the library for this machine, compiled (a few seconds) unless the cache holds it; raises BuildError."""
    compiler = _compiler()
    openmp = torch_openmp()
    target = cache_dir() / "native" / f"{_key(compiler, march, openmp)}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            _compile(compiler, march, openmp, Path(scratch), Path(scratch) / "kernels.so")
            os.replace(Path(scratch) / "kernels.so", target)
    except OSError as error:
        raise BuildError(f"cannot write the kernel cache {str(target.parent)!r}: {error.strerror}") from error
    return target


def torch_openmp() -> Path | None:
    """The libgomp inside the torch wheel; None where torch uses the system's (then -fopenmp finds the same one)."""
    import torch

    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return found[0] if found else None


def _compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else ("g++", "c++"):
        if path := shutil.which(name):
            return path
    raise BuildError(f"no C++ compiler: {wanted or 'g++'!r} is not on PATH")


def _key(compiler: str, march: str, openmp: Path | None) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(SOURCE_DIR.glob("*.h")) + [SOURCE_DIR / name for name in SOURCES]:
        digest.update(path.read_bytes())
    version = _run([compiler, "--version"]).splitlines()[0]
    facts = (*FLAGS, march, version, platform.machine(), _cpu_features(), openmp.name if openmp else "")
    digest.update("\0".join(facts).encode())
    return digest.hexdigest()


def _cpu_features() -> str:
    """What -march=native looks at: a cache on a shared disk serves machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("vendor_id", "cpu family", "model\t", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compile(compiler: str, march: str, openmp: Path | None, scratch: Path, output: Path) -> None:
    flags = (*FLAGS, f"-march={march}")
    objects = [scratch / f"{name}.o" for name in SOURCES]

    def one(index: int) -> str:
        return _run([compiler, *flags, "-c", str(SOURCE_DIR / SOURCES[index]), "-o", str(objects[index])])

    with ThreadPoolExecutor(len(SOURCES)) as pool:
        list(pool.map(one, range(len(SOURCES))))
    runtime = [str(openmp)] if openmp else ["-fopenmp"]
    _run([compiler, "-shared", *map(str, objects), "-o", str(output), *runtime])


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise BuildError(f"{command[0]} failed with exit status {done.returncode}: {tail}")
    return done.stdout
