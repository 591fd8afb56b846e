"""`signalbox policy`: the commands of the policies' rooms under one name."""

from __future__ import annotations

import typer

from deploy import generations_cli, replay_cli, rightsize_cli, simulate_cli

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Publish, train, judge and simulate routing policies.",
)
for _part in (generations_cli.app, replay_cli.app, rightsize_cli.app, simulate_cli.app):
    app.registered_commands += _part.registered_commands
