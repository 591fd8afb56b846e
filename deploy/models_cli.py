"""`signalbox models`: fetch and list models."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Fetch and list models."
)


@app.command()
def pull(
    name: Annotated[
        str, typer.Argument(help="A name from `models list`, a Hugging Face id, a folder or a .gguf file.")
    ],
) -> None:
    """Make a model present on this machine; prints where it lies."""
    from deploy.models import pull as fetch

    typer.echo(str(fetch(name)))


@app.command("list")
def show() -> None:
    """Show the models that can be pulled by name, and whether they are here."""
    from rich.console import Console
    from rich.table import Table

    from deploy.models import CATALOGUE, present

    table = Table("name", "what it is", "size", "on this machine", box=None)
    for name, model in CATALOGUE.items():
        table.add_row(name, model.summary, f"{model.size / 1e6:.0f} MB", str(present(name) or "no"))
    Console(soft_wrap=True).print(table)
