"""What a person at the terminal sees of an instance: progress, the ready message, the status table."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploy import instance, paths, up
from deploy.fleet import DEFAULT_FLEET, Fleet, load
from replicas.protocol import EngineFault

console = Console(highlight=False, soft_wrap=True)


def serve(fleet_file: Path | None, *, detach: bool, host: str | None, port: int | None) -> None:
    """`signalbox up`. Returns when the endpoint is healthy (detached) or when it was told to stop."""
    fleet = load(fleet_file or DEFAULT_FLEET)
    host, port = host or fleet.gateway.host, port or fleet.gateway.port
    _fetch_models(fleet)
    key = _first_key(fleet)
    with up.interruptible():
        launched = up.launch(fleet_file, host=host, port=port, detach=detach)
        try:
            with console.status("starting") as spinner:
                for step in launched.steps():
                    spinner.update(Text(f"starting: {step}"))
            if not detach:
                _show_ready(fleet, key)
                console.print("Ctrl-C stops it.")
                launched.process.wait()
                raise EngineFault(f"the instance ended by itself; log: {instance.log_file()}")
        except KeyboardInterrupt:
            console.print("stopping; running requests may finish, Ctrl-C again ends them")
            launched.stop()
        except BaseException:
            launched.stop()
            raise
    if detach and launched.process.poll() is None:
        _show_ready(fleet, key)  # whoever reads this may hang up (`| head -1`): the instance stays


def _fetch_models(fleet: Fleet) -> None:
    """Pull what is not in the cache yet, with progress, before anything is started."""
    for model in fleet.local:
        if source := getattr(model, "source", None) or getattr(model, "tokenizer", None):
            from deploy.models import pull

            pull(source)


def _first_key(fleet: Fleet) -> str | None:
    """The owner's key, made when this home has no key at all; None when only its hash is known."""
    from gateway.keys import KeyRegister, load_secret

    kept = instance.first_key_file()
    with KeyRegister(paths.database_url(fleet.gateway.database), load_secret(instance.home())) as register:
        if register.list():
            return kept.read_text().strip() if kept.exists() else None
        key = register.create("default")
    kept.touch(mode=0o600)
    kept.write_text(key + "\n")
    return key


def _show_ready(fleet: Fleet, key: str | None) -> None:
    record = instance.read()
    assert record is not None, "the supervisor keeps its record while it runs"
    shown = key or "$SIGNALBOX_API_KEY"
    model = fleet.models[0].name
    console.print(f"endpoint  {record.base_url}/v1")
    console.print(f"key       {key or 'made earlier and not kept; `signalbox keys create NAME` makes another'}")
    console.print(f"models    {', '.join(model.name for model in fleet.models)}")
    question = {"role": "user", "content": "What is the capital of France?"}
    body = json.dumps({"model": model, "messages": [question], "temperature": 0})
    console.print(
        f'curl {record.base_url}/v1/chat/completions -H "Authorization: Bearer {shown}" '
        f"-H 'Content-Type: application/json' -d {shlex.quote(body)}",
        markup=False,
    )


def show(found: dict[str, Any]) -> None:
    """`signalbox status` for a person."""
    console.print(f"endpoint  {found['endpoint']}   {found['state']} {found['detail']}".rstrip())
    console.print(f"fleet     {found['fleet']}   pid {found['pid']}   log {found['log']}")
    for deployment in found["deployments"]:
        if deployment["status"] != "HEALTHY":
            console.print(f"{deployment['name']}: {deployment['status']} {deployment['message']}", markup=False)
    table = Table("model", "replica", "state", "running", "waiting", "blocks used", "tokens out", box=None)
    for replica in found["replicas"]:
        stats = replica.get("stats", {})
        used = stats.get("kv_blocks_total", 0) - stats.get("kv_blocks_free", 0)
        table.add_row(
            replica["model"],
            replica["id"],
            replica["state"],
            str(stats.get("num_requests_running", "-")),
            str(stats.get("num_requests_waiting", "-")),
            f"{used}/{stats['kv_blocks_total']}" if stats else "-",
            str(stats.get("generation_tokens", "-")),
        )
    console.print(table)
    for replica in found["replicas"]:
        if replica.get("backends"):
            console.print(f"{replica['id']}: {replica['backends']}", markup=False)
