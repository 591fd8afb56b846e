"""The `signalbox` command. Subcommands import what they need when they run, so that `--help` answers at once."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

from replicas.protocol import SignalboxError

# Subcommands that are built elsewhere: name -> (module, attribute, help).
_MOUNTED = {
    "chat": ("deploy.chat", "chat", "Talk to the endpoint from the terminal."),
    "keys": ("deploy.keys_cli", "app", "Create, list and revoke API keys."),
    "models": ("deploy.models_cli", "app", "Fetch and list models."),
}


class _LazyGroup(TyperGroup):
    """Lists all subcommands, imports a mounted one only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *_MOUNTED]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _MOUNTED:
            return super().get_command(ctx, cmd_name)
        module, attribute, summary = _MOUNTED[cmd_name]
        if ctx.resilient_parsing or not _is_called(ctx, cmd_name):
            return click.Command(cmd_name, short_help=summary, help=summary)
        return _as_command(getattr(importlib.import_module(module), attribute), cmd_name, summary)


def _is_called(ctx: click.Context, name: str) -> bool:
    return name in (*getattr(ctx, "protected_args", ()), *getattr(ctx, "_protected_args", ()), *ctx.args, *sys.argv[1:])


def _as_command(built: Any, name: str, summary: str) -> click.Command:
    if not isinstance(built, typer.Typer):
        single = typer.Typer(add_completion=False)
        single.command(name, help=summary)(built)
        built = single
    command: click.Command = typer.main.get_command(built)
    command.name = name
    return command


app = typer.Typer(
    cls=_LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Many language models behind one OpenAI-compatible door.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"signalbox {version('signalbox')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def up(
    fleet: Annotated[Path | None, typer.Argument(help="Fleet file; without one, the embedded default model.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return when the endpoint is healthy.")] = False,
    host: Annotated[str | None, typer.Option(help="Address to listen on; wins over the file's.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port; wins over the file's.")] = None,
) -> None:
    """Serve a fleet on this machine."""
    from deploy.front import serve

    serve(fleet, detach=detach, host=host, port=port)


@app.command()
def down() -> None:
    """Stop what `up` started in this home."""
    from deploy.up import stop

    record = stop()
    typer.echo(f"stopped {record.base_url}")


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")] = False,
) -> None:
    """Show models, replicas and their load."""
    from deploy.up import survey

    found = survey()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        from deploy.front import show

        show(found)


def main() -> None:
    """Console script: our own errors are one line on stderr and exit status 1, never a traceback."""
    try:
        app()
    except SignalboxError as error:
        typer.echo(f"signalbox: {error.message}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
