"""`signalbox policy`: the commands of the policies' rooms under one name."""

from __future__ import annotations

import typer

from deploy import rightsize_cli, simulate_cli

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Train, judge and simulate routing policies.")
app.registered_commands += [*rightsize_cli.app.registered_commands, *simulate_cli.app.registered_commands]
