"""`signalbox load peers`: Signalbox and its peers under the same load."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from load.environments import ROOT
from load.peers.contestants import PEERS


def peers(
    only: Annotated[str, typer.Option(metavar="NAMES", help=f"Of {', '.join(PEERS)}.")] = "",
    skip: Annotated[str, typer.Option(metavar="NAMES", help="All but these.")] = "",
    seconds: Annotated[float, typer.Option(min=1.0, help="Of load for each task of each server.")] = 20.0,
    model: Annotated[
        str, typer.Option(help="A name, folder or .gguf file; model servers serve its weights.")
    ] = "smollm2-135m-instruct",
    environments: Annotated[Path, typer.Option(help="Where the peers' environments are, or are made.")] = ROOT,
    install: Annotated[bool, typer.Option("--install", help="Make the environments and stop there.")] = False,
    go_on: Annotated[
        Path | None, typer.Option("--from", help="A file of --json: whom it has measured is not measured again.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures there.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the page there.")] = None,
) -> None:
    """Start the peers one after the other, and Signalbox; load each with the same; show ratios.

    Model servers: vllm, llama-cpp, transformers. Gateways over one mock: litellm. Plain echo: ray-serve. Each peer has
    an environment of its own, made by pip on the first run. What cannot be installed, started or loaded is named with
    its last words.

    Exit status: 0 all compared · 2 an option cannot be read · 3 a server could not be installed, started or loaded · 4
    the generator could not keep up · 130 interrupted. Results are written in every case but the second.
    """
    from deploy.models import pull
    from load import report, results
    from load.peers.comparison import Comparison, Setting, verdict
    from load.peers.contestants import chosen
    from load.peers.show import page, show

    contestants = chosen(_names(only), _names(skip))
    signal.signal(signal.SIGTERM, _interrupt)
    comparison = Comparison(contestants, Setting(pull(model), seconds, environments), Console(stderr=True))
    if go_on is not None:
        comparison.go_on_from(go_on)
    if install:
        comparison.install()
        raise typer.Exit(verdict(comparison.document()))
    document: dict[str, Any] = {}
    for document in comparison.run():
        if json_file is not None:
            results.write(json_file, document)
    show(document, Console(width=None if sys.stdout.isatty() else 170))
    if html is not None:
        report.write(page(document), html)
    raise typer.Exit(verdict(document))


def _names(text: str) -> list[str]:
    return [name for name in text.replace(",", " ").split() if name]


def _interrupt(number: int, frame: Any) -> NoReturn:
    """Being terminated is being interrupted: what was started is stopped."""
    raise KeyboardInterrupt
