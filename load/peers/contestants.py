"""Who is compared: every server, what it runs on, how it is started. One entry here is all that a new one takes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from load.environments import LITELLM, LLAMA_CPP, TRANSFORMERS, VLLM_CPU, Environment
from load.own_instance import free_port, instance
from load.peers.serving import Served
from load.peers.workloads import ECHO, GATEWAY, MODEL
from load.processes import BEHIND, running
from load.units import BadOption
from load.weights import exported, gguf

_CONTEXT = 2048  # tokens of a sequence, for all model servers
_KV_GIB = 2
_WHOLE = {"ignore_eos": True}  # for servers that know it: answers as long as was asked
_KEY = "sk-signalbox-load-peers-0123456789abcdef"


# The yardstick is what others are measured over: it is compared with nobody.
OURS, PEER, YARDSTICK = "ours", "peer", "yardstick"


@dataclass(frozen=True, slots=True)
class Stage:
    """What a server is started with. python: its environment's. upstream: the mock behind gateways, a URL with /v1."""

    python: Path
    model: Path
    scratch: Path
    upstream: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """serve: a context in which the server was started, not waited for. limit_s: from there to its first token.

    environment: None for what runs in our own. packages: whose versions are shown. note: what a reader of the figures
    must know.
    """

    name: str
    kind: str
    serve: Callable[[Stage], AbstractContextManager[Served]]
    packages: tuple[str, ...] = ()
    role: str = PEER
    weights: str = ""
    environment: Environment | None = None
    limit_s: float = 180.0
    note: str = ""


# ------------------------------------------------------------------------------------------------------------- ours


def _own(
    fleet: Callable[[Stage], Mapping[str, Any]], extra: Mapping[str, Any] | None = None
) -> Callable[[Stage], AbstractContextManager[Served]]:
    @contextmanager
    def serve(stage: Stage) -> Iterator[Served]:
        model = dict(fleet(stage))
        with instance(json.dumps({"models": [{"name": "model", **model}]}), behind=True) as own:
            # making a key belongs to no start
            began = time.monotonic() - own.up_s
            yield Served(own.base_url, "model", began, key=own.key, extra=extra or {})

    return serve


def _engine(**settings: Any) -> Callable[[Stage], AbstractContextManager[Served]]:
    settings = {"kv_memory_gib": _KV_GIB, "max_model_len": _CONTEXT, **settings}
    return _own(lambda stage: {"source": str(stage.model.absolute()), "engine_settings": settings}, _WHOLE)


@contextmanager
def _mock(stage: Stage) -> Iterator[Served]:
    yield Served(stage.upstream, "normal", began=time.monotonic())


def _upstream(stage: Stage) -> Mapping[str, Any]:
    return {"engine": "openai", "base_url": stage.upstream, "upstream_model": "normal", "tokenizer": "estimate"}


# ------------------------------------------------------------------------------------------------------------ peers


@dataclass(frozen=True, slots=True)
class Start:
    """command: after the environment's interpreter or beside it. variables: added to our environment."""

    command: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)
    model: str = "model"
    key: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    ends_with_done: bool = True


_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}


def _peer(start: Callable[[Stage, int], Start]) -> Callable[[Stage], AbstractContextManager[Served]]:
    @contextmanager
    def serve(stage: Stage) -> Iterator[Served]:
        port = free_port()
        how = start(stage, port)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHON"))}
        began = time.monotonic()
        environment |= {**_OFFLINE, **how.variables}
        with running([*BEHIND, *how.command], environment, stage.scratch / "log") as child:
            yield Served(
                f"http://127.0.0.1:{port}",
                how.model,
                began,
                key=how.key,
                extra=how.extra,
                ends_with_done=how.ends_with_done,
                child=child,
            )

    return serve


def _vllm(stage: Stage, port: int) -> Start:
    cpus = os.cpu_count() or 1
    return Start(
        [
            # not the command `vllm`: it wants a distribution of that name, and this one is called vllm-cpu
            *(str(stage.python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(exported(stage.model))),
            *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model"),
            *("--dtype", "float32", "--max-model-len", str(_CONTEXT), "--max-num-seqs", "32"),
        ],
        {
            # all cores and none reserved, as in load/peer_vllm.py
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{cpus - 1}" if cpus > 1 else "0",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_CPU_KVCACHE_SPACE": str(_KV_GIB),
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
        },
        extra=_WHOLE,
    )


def _llama_cpp(stage: Stage, port: int) -> Start:
    cpus = str(os.cpu_count() or 1)
    command = [str(stage.python), "-m", "llama_cpp.server", "--model", str(gguf(stage.model)), "--model_alias", "model"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--n_ctx", str(_CONTEXT), "--n_threads", cpus]
    # by its default, a request that comes ends the one that is being answered
    return Start([*command, "--n_threads_batch", cpus, "--interrupt_requests", "False"])


def _transformers(stage: Stage, port: int) -> Start:
    command = [str(stage.python.with_name("transformers")), "serve", str(exported(stage.model))]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    return Start(command, model=str(exported(stage.model)), ends_with_done=False)


def _litellm(stage: Stage, port: int) -> Start:
    parameters = {"model": "openai/normal", "api_base": stage.upstream, "api_key": "none"}
    config = stage.scratch / "litellm.yaml"
    config.write_text(json.dumps({"model_list": [{"model_name": "model", "litellm_params": parameters}]}))
    command = [str(stage.python.with_name("litellm")), "--config", str(config), "--host", "127.0.0.1"]
    variables = {"LITELLM_MASTER_KEY": _KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # which it would fetch at start
    return Start([*command, "--port", str(port)], variables, key=_KEY)


def _ray_serve(stage: Stage, port: int) -> Start:
    script = Path(__file__).with_name("ray_echo.py")
    return Start([str(stage.python), str(script), "--port", str(port), "--scratch", str(stage.scratch)])


_OURS = ("signalbox", "torch")

CONTESTANTS: Mapping[str, Contestant] = {
    one.name: one
    for one in (
        Contestant(
            name="signalbox", kind=MODEL, role=OURS, serve=_engine(), packages=_OURS, weights="Q4_1 as in the file"
        ),
        Contestant(
            name="signalbox-float32",
            kind=MODEL,
            role=OURS,
            serve=_engine(quantization="none"),
            packages=_OURS,
            weights="float32",
        ),
        Contestant(
            name="vllm",
            kind=MODEL,
            serve=_peer(_vllm),
            packages=("vllm-cpu", "torch"),
            weights="float32",
            environment=VLLM_CPU,
            limit_s=600.0,
        ),
        Contestant(
            name="llama-cpp",
            kind=MODEL,
            serve=_peer(_llama_cpp),
            packages=("llama-cpp-python",),
            weights="Q4_1 as in the file",
            environment=LLAMA_CPP,
            note="answers one request at a time",
        ),
        Contestant(
            name="transformers",
            kind=MODEL,
            serve=_peer(_transformers),
            packages=("transformers", "torch"),
            weights="float32",
            environment=TRANSFORMERS,
            note="one request at a time; its streams never say [DONE]: an answer is whole with its finish_reason",
        ),
        Contestant(
            name="mock", kind=GATEWAY, role=YARDSTICK, serve=_mock, note="both gateways' upstream, asked directly"
        ),
        Contestant(name="signalbox-gateway", kind=GATEWAY, role=OURS, serve=_own(_upstream), packages=("signalbox",)),
        Contestant(name="litellm", kind=GATEWAY, serve=_peer(_litellm), packages=("litellm",), environment=LITELLM),
        Contestant(
            name="signalbox-fake",
            kind=ECHO,
            role=OURS,
            serve=_own(lambda _: {"engine": "fake"}),
            packages=("signalbox",),
        ),
        Contestant(name="ray-serve", kind=ECHO, serve=_peer(_ray_serve), packages=("ray",)),
    )
}
PEERS = tuple(name for name, one in CONTESTANTS.items() if one.role == PEER)


def chosen(only: Sequence[str] = (), skip: Sequence[str] = ()) -> list[Contestant]:
    """The peers asked for, in the table's order, and ours of their kinds. Raises BadOption for a name that is none."""
    for name in (*only, *skip):
        if name not in PEERS:
            raise BadOption(f"no peer {name!r}; there are {', '.join(PEERS)}")
    peers = [name for name in PEERS if (not only or name in only) and name not in skip]
    if not peers:
        raise BadOption("--only and --skip leave no peer")
    kinds = {CONTESTANTS[name].kind for name in peers}
    return [one for one in CONTESTANTS.values() if one.name in peers or (one.role != PEER and one.kind in kinds)]
