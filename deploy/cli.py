"""The `signalbox` command. Subcommands import what they need when they run, so that `--help` answers at once."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from replicas.protocol import SignalboxError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Many language models behind one OpenAI-compatible door.",
)

# Everything after the name, --help included, is for the command that is called.
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _call(module: str, attribute: str, ctx: typer.Context) -> None:
    """Run a command that is defined elsewhere, a Typer or a plain function, with the arguments that are left."""
    built = getattr(importlib.import_module(module), attribute)
    if not isinstance(built, typer.Typer):
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command()(built)
        built = single
    built(args=ctx.args, prog_name=ctx.command_path)


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


@app.command(context_settings=_PASS_ON)
def chat(ctx: typer.Context) -> None:
    """Talk to the endpoint from the terminal."""
    _call("deploy.chat", "chat", ctx)


@app.command(context_settings=_PASS_ON)
def keys(ctx: typer.Context) -> None:
    """Create, list and revoke API keys."""
    _call("deploy.keys_cli", "app", ctx)


@app.command(context_settings=_PASS_ON)
def models(ctx: typer.Context) -> None:
    """Fetch and list models."""
    _call("deploy.models_cli", "app", ctx)


@app.command(context_settings=_PASS_ON)
def policy(ctx: typer.Context) -> None:
    """Publish, train, judge and simulate routing policies."""
    _call("deploy.policy_cli", "app", ctx)


@app.command(context_settings=_PASS_ON)
def simulate(ctx: typer.Context) -> None:
    """Calibrate a simulated fleet on a measured run, and ask it what would happen."""
    _call("deploy.simulator_cli", "app", ctx)


@app.command(context_settings=_PASS_ON)
def frontier(ctx: typer.Context) -> None:
    """Sweep a policy knob and the load on recorded traffic: cost against goodput."""
    _call("deploy.frontier_cli", "frontier", ctx)


@app.command("admin-token", context_settings=_PASS_ON)
def admin_token(ctx: typer.Context) -> None:
    """Create, list and revoke the tokens that open /admin."""
    _call("deploy.admin_cli", "app", ctx)


@app.command(context_settings=_PASS_ON)
def load(ctx: typer.Context) -> None:
    """Send load to any OpenAI-shaped server and judge it."""
    _call("deploy.load_cli", "app", ctx)


@app.command(context_settings=_PASS_ON)
def explain(ctx: typer.Context) -> None:
    """Tell why a request went where it went."""
    _call("deploy.explain_cli", "explain", ctx)


@app.command(context_settings=_PASS_ON)
def usage(ctx: typer.Context) -> None:
    """Show what was used, what it cost, and how budgets stand."""
    _call("deploy.usage_cli", "usage", ctx)


@app.command(context_settings=_PASS_ON)
def quantize(ctx: typer.Context) -> None:
    """Round a model's weights to 2, 4 or 8 bits: AWQ, GPTQ or round-to-nearest."""
    _call("deploy.quantize_cli", "quantize", ctx)


@app.command("eval", context_settings=_PASS_ON)
def evaluate(ctx: typer.Context) -> None:
    """Measure a model's quality on a text."""
    _call("deploy.eval_cli", "app", ctx)


@app.command("train-heads", context_settings=_PASS_ON)
def train_heads(ctx: typer.Context) -> None:
    """Train Medusa heads for speculative decoding from what a model writes itself."""
    _call("deploy.speculation_cli", "train_heads", ctx)


@app.command("distill-draft", context_settings=_PASS_ON)
def distill_draft(ctx: typer.Context) -> None:
    """Make a small draft model from some of a model's own layers."""
    _call("deploy.speculation_cli", "distill_draft", ctx)


def main() -> None:
    """Console script: our own errors are one line on stderr and exit status 1, never a traceback."""
    try:
        app()
    except SignalboxError as error:
        typer.echo(f"signalbox: {error.message}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
