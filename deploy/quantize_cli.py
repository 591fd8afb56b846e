"""`signalbox quantize`: a model's weights in fewer bits, as a folder that this engine and others load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from replicas.protocol import ConfigError


def quantize(
    model: Annotated[
        str, typer.Argument(help="A name from `models list`, a Hugging Face id, a folder or a .gguf file.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not hold anything yet.")],
    method: Annotated[
        str,
        typer.Option(
            help="awq: scale up inputs that matter, then clip (Lin et al. 2023). gptq: correct each rounding in the "
            "inputs to come, by the Hessian (Frantar et al. 2022). rtn: round to nearest, no calibration."
        ),
    ] = "awq",
    bits: Annotated[int, typer.Option(help="2, 4 or 8; awq makes 4. At 2 bits every method loses much.")] = 4,
    group_size: Annotated[
        int,
        typer.Option(help="Inputs that share a scale; it must divide every layer's. -1: one scale for each output."),
    ] = 64,
    calibration: Annotated[
        Path | None, typer.Option(help="Text file (UTF-8) like what the model will read; awq and gptq need one.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="awq, gptq or compressed-tensors; by default what the method's own tools write.")
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Calibration windows, evenly spaced over the text.")] = 64,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a calibration window.")] = 512,
    symmetric: Annotated[bool, typer.Option(help="The zero is the middle code: smaller, a little worse.")] = False,
    act_order: Annotated[
        str, typer.Option(help="gptq's order of inputs: none, static (groups stay neighbours) or desc (desc_act).")
    ] = "static",
    damping: Annotated[float, typer.Option(help="Share of the Hessian's mean diagonal that gptq adds to it.")] = 0.01,
) -> None:
    """Round a model's weights: AWQ, GPTQ or to the nearest.

    Layers are done one after the other and kept in OUT.parts: after ^C or a crash the same command goes on with the
    first that is missing. OUT appears when all is done. Embedding and head stay in 16 bits.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from deploy.models import pull
    from replicas.engine.quantizers import Settings
    from replicas.engine.quantizers import quantize as run
    from replicas.engine.quantizers.layouts import usual_layout

    settings = Settings(
        method=method,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        samples=samples,
        window=window,
        damping=damping,
        order=act_order,
    )
    settings.check()
    source = pull(model)
    tokens = _tokens(source, calibration) if settings.calibrated and calibration is not None else None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(f"{method} {bits} bits, layers", total=None)
            result = run(
                source,
                out,
                settings,
                layout=layout,
                calibration=tokens,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except KeyboardInterrupt:
        typer.echo("interrupted: the same command goes on with the first layer that is missing", err=True)
        raise typer.Exit(130) from None
    typer.echo(
        f"{out}: layers {result.layer_bytes / 1e6:.1f} MB, {result.times_smaller:.2f}x smaller than in 16 bits; "
        f"file {result.file_bytes / 1e6:.1f} MB" + _taken_up(result.resumed_layers)
    )
    if (layout or usual_layout(method, bits)) == "gptq" and bits in (4, 8) and not symmetric:
        other = "" if act_order == "desc" else "; --layout compressed-tensors keeps these zeros and is read by both"
        typer.echo(f"vLLM (0.32) reads the gptq layout only with --symmetric{other}", err=True)


def _taken_up(layers: int) -> str:
    return f"; {layers} layers were there from an earlier run" if layers else ""


def _tokens(source: Path, text: Path) -> list[int]:
    from replicas.engine.tokenizer import Tokenizer
    from replicas.engine.weights import open_checkpoint

    return Tokenizer.load(open_checkpoint(source)).encode(read_text(text, "calibration"))


def read_text(file: Path, option: str) -> str:
    """ConfigError naming the option and the file if it is not UTF-8 text."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--{option} {str(file)!r} cannot be read: {error}", param=option) from error
