"""`signalbox admin-token`: create, list and revoke the tokens that open /admin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from deploy import paths
from deploy.generations_cli import Database, database_url, table, when

if TYPE_CHECKING:
    from gateway.admin_tokens import AdminTokenRegister

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _register(database: str) -> AdminTokenRegister:
    from gateway.admin_tokens import AdminTokenRegister
    from gateway.keys import load_secret

    return AdminTokenRegister(database_url(database), load_secret(paths.state_dir()))


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whoever will use it: the author of what it changes.")],
    database: Database = "",
) -> None:
    """Create a token. It is printed alone on the last line, and never again."""
    with _register(database) as register:
        token = register.create(name)
    typer.echo(f"admin token {name!r} works at once; it is shown only now:", err=True)
    typer.echo(token)


@app.command("list")
def list_tokens(database: Database = "") -> None:
    """Show all tokens, live and revoked, oldest first."""
    with _register(database) as register:
        tokens = register.list()
    rows = [
        (t.id, t.name, f"{t.hint}…", when(t.created_at), f"revoked {when(t.revoked_at)}" if t.revoked_at else "live")
        for t in tokens
    ]
    table(("id", "name", "begins with", "created", "state"), rows)


@app.command()
def revoke(name: Annotated[str, typer.Argument(help="Name or id of a live token.")], database: Database = "") -> None:
    """End a token. Every gateway refuses it at once."""
    with _register(database) as register:
        token = register.revoke(name)
    typer.echo(f"revoked {token.name!r} ({token.id})")
