"""The table of rooms (docs/architecture.md) holds: who may import what, read from the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("gateway", "replicas", "policies", "deploy", "load")
STANDARD = set(sys.stdlib_module_names)

# Longest prefix wins. "room.*" allows a whole room, a name allows that module and what is below it.
ENGINE = {"replicas.protocol", "replicas.engine", "torch", "numpy", "safetensors"}
ENGINE_LAZY = {"gguf", "tokenizers", "triton", "flash_attn", "flash_attn_interface", "xgrammar", "transformers"}
RULES: dict[str, tuple[set[str], set[str]]] = {  # module: (anywhere, inside functions only)
    "replicas.protocol": (set(), set()),
    "replicas.wire": ({"replicas.protocol", "msgspec", "zmq"}, set()),
    "policies": (
        {"replicas.protocol", "policies", "pydantic", "pydantic_core", "yaml", "numpy"},
        {"sklearn", "scipy", "matplotlib", "genai_prices"},
    ),
    "replicas.engine.scheduler": (
        {"replicas.protocol"}
        | {
            f"replicas.engine.{name}"
            for name in ("blocks", "deadlines", "pace", "phases", "sequence", "turn", "waiting")
        },
        set(),
    ),
    "replicas.engine.turn": ({f"replicas.engine.{name}" for name in ("pace", "sequence", "waiting")}, set()),
    "replicas.engine.waiting": ({"replicas.protocol"}, set()),
    "replicas.engine.deadlines": ({"replicas.protocol"}, set()),
    "replicas.engine.pace": (set(), set()),
    "replicas.engine.blocks": ({"replicas.protocol", "replicas.engine.host_store"}, set()),
    "replicas.engine.host_store": (set(), set()),
    "replicas.engine.phases": ({"replicas.protocol"}, set()),
    "replicas.engine.sequence": ({"replicas.protocol", "replicas.engine.phases", "replicas.engine.waiting"}, set()),
    "replicas.engine": (ENGINE, ENGINE_LAZY),
    "replicas.engine.triton.kernels": (ENGINE | {"triton"}, set()),
    "replicas": (
        {"replicas", "msgspec", "zmq", "httpx", "tokenizers"},
        {"ray", "torch", "uvloop", "tiktoken", "uvicorn"},
    ),
    "replicas.upstream_tokens": (set(), {"tiktoken"}),
    "replicas.replica": ({"replicas", "msgspec", "zmq", "ray", "tokenizers"}, {"torch"}),
    "replicas.process": (set(), set()),
    "replicas.directory": ({"replicas.protocol"}, {"ray"}),
    "gateway": (
        {
            "gateway",
            "policies",
            "replicas.protocol",
            "replicas.wire",
            "replicas.client",
            "replicas.process",
            "replicas.upstream",
            "replicas.upstream_config",
            "replicas.upstream_errors",
            "replicas.upstream_messages",
            "replicas.upstream_tokens",
            "fastapi",
            "starlette",
            "pydantic",
            "pydantic_core",
            "httpx",
            "tokenizers",
            "jinja2",
            "tiktoken",
            "sqlalchemy",
            "alembic",
            "opentelemetry",
            "prometheus_client",
            "msgspec",
        },
        set(),
    ),
    "gateway.serve": ({"gateway", "replicas", "ray", "fastapi", "starlette"}, set()),
    "load": (
        {"load", "policies.traces", "httpx", "aiohttp", "numpy", "rich", "uvicorn"},
        {"matplotlib", "plotly", "psycopg", "ray"},
    ),
    "deploy": ({"*"}, {"*"}),
}


def modules() -> Iterator[tuple[str, Path]]:
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether the import is lazy or for type checkers only)."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            inner = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                inner = True
            if isinstance(child, ast.Import):
                yield from ((alias.name, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: import absolutely"
                yield child.module or "", lazy
            else:
                yield from walk(child, inner)

    yield from walk(ast.parse(path.read_text()), False)


def allowed(name: str, names: set[str]) -> bool:
    return "*" in names or any(name == one or name.startswith(one + ".") for one in names)


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_module_imports_only_what_its_room_may(module: str, path: Path) -> None:
    room = max((rule for rule in RULES if module == rule or module.startswith(rule + ".")), key=len)
    anywhere, lazily = RULES[room]
    for name, lazy in imports(path):
        if name.split(".")[0] in STANDARD:
            continue
        assert allowed(name, anywhere | lazily if lazy else anywhere), (
            f"{module} imports {name}; the rule of {room} forbids"
        )


def test_only_one_gateway_file_knows_ray() -> None:
    knowing = {
        m
        for m, path in modules()
        if m.startswith("gateway") and any(n.split(".")[0] == "ray" for n, _ in imports(path))
    }
    assert knowing <= {"gateway.serve"}


@pytest.mark.parametrize(
    ("imported", "absent"),
    [
        ("policies.peers", ("torch", "ray", "fastapi", "transformers")),
        ("replicas.protocol", ("torch", "ray", "fastapi", "zmq", "msgspec", "pydantic")),
        ("replicas.engine.scheduler", ("torch", "ray", "fastapi", "numpy")),
        ("replicas.engine.engine", ("ray", "fastapi", "pydantic", "msgspec", "zmq", "transformers")),
        ("gateway.app", ("torch", "transformers", "ray")),
        ("deploy.cli", ("torch", "transformers", "ray", "fastapi", "sqlalchemy")),
    ],
)
def test_importing_a_room_does_not_load_what_it_must_not_need(imported: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {imported}; print([name for name in {absent!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
