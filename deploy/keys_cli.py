"""`signalbox keys`: create, list and revoke API keys in an instance's database. Works whether or not it is running."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from deploy import paths
from deploy.generations_cli import Database, database_url
from gateway.keys import ApiKey, KeyRegister, load_secret

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _register(database: str) -> KeyRegister:
    return KeyRegister(database_url(database), load_secret(paths.state_dir()))


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="A name of your choice; one live key has it at most.")],
    tenant: Annotated[
        str | None, typer.Option(help="Keys of one tenant share the prefix cache; the key's own name by default.")
    ] = None,
    database: Database = "",
) -> None:
    """Create a key. It is printed alone on the last line, and never again."""
    with _register(database) as register:
        key = register.create(name, tenant)
    typer.echo(
        f"key {name!r} of tenant {tenant if tenant is not None else name!r} works at once; it is shown only now:",
        err=True,
    )
    typer.echo(key)


@app.command("list")
def list_keys(database: Database = "") -> None:
    """Show all keys, live and revoked, oldest first."""
    from rich.console import Console
    from rich.table import Table

    table = Table("id", "name", "tenant", "begins with", "created", "state")
    with _register(database) as register:
        for key in register.list():
            table.add_row(key.id, key.name, key.tenant, f"{key.hint}…", _day(key.created_at), _state(key))
    Console().print(table)


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="Name or id of a live key.")],
    database: Database = "",
) -> None:
    """End a key. Every gateway refuses it within a second."""
    with _register(database) as register:
        key = register.revoke(name)
    typer.echo(f"revoked {key.name!r} ({key.id})")


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _state(key: ApiKey) -> str:
    return "live" if key.revoked_at is None else f"revoked {_day(key.revoked_at)}"
