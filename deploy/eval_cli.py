"""`signalbox eval`: a model's quality, as figures with their method."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from deploy.quantize_cli import read_text

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Measure a model's quality."
)


@app.callback()
def _root() -> None:
    pass


@app.command()
def perplexity(
    model: Annotated[
        str, typer.Argument(help="A name from `models list`, a Hugging Face id, a folder or a .gguf file.")
    ],
    text: Annotated[Path, typer.Option(help="UTF-8 text to predict.")],
    window: Annotated[
        int | None,
        typer.Option(help="Tokens computed together, nothing before them is seen; 1024 if the model can."),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one window's start to the next; by default the window.")
    ] = None,
    limit_tokens: Annotated[int | None, typer.Option(min=2, help="Only the text's first tokens.")] = None,
    quantization: Annotated[str, typer.Option(help="As in a fleet file: auto, none or int8.")] = "auto",
    kv_cache_dtype: Annotated[
        str, typer.Option(help="As in a fleet file: auto, fp8_e4m3, fp8_e4m3_head or int8.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="Of activations: auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")] = False,
) -> None:
    """Windowed perplexity of a text: exp of the mean negative log-likelihood of its tokens.

    The text's tokens are cut into windows; each token is scored once, in the first window that holds it and something
    before it. No special tokens are added. Computed by the decoder that serves, through its KV cache.
    """
    from rich.console import Console
    from rich.progress import Progress

    from deploy.models import pull
    from replicas.engine.config import EngineConfig
    from replicas.engine.evaluation import measure
    from replicas.engine.loading import load

    content = read_text(text, "text")
    config = EngineConfig(
        model=str(pull(model)), quantization=quantization, kv_cache_dtype=kv_cache_dtype, dtype=dtype, device=device
    )
    loaded = load(config)
    tokens = loaded.tokenizer.encode(content)[:limit_tokens]
    with Progress(console=Console(stderr=True), disable=as_json) as bar:
        task = bar.add_task("tokens", total=None)
        found = measure(
            loaded,
            tokens,
            window=window,
            stride=stride,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        figures = {"perplexity": found.value, "bits_per_token": found.bits_per_token, **asdict(found)}
        held = {"quantization": quantization, "kv_cache": loaded.kv_format, "weight_bytes": loaded.decoder.weight_bytes}
        typer.echo(json.dumps({"model": model, "text": str(text), **figures, **held}, indent=2))
        return
    typer.echo(
        f"perplexity {found.value:.4f} ({found.bits_per_token:.4f} bits a token) over {found.scored} of "
        f"{found.text_tokens} tokens in {found.seconds:.1f} s\n"
        f"method: windows of {found.window} tokens every {found.stride}, each token scored once in the first window "
        "that holds it and something before it; exp of the mean negative log-likelihood in nats\n"
        f"weights {loaded.decoder.weight_bytes / 1e6:.1f} MB (quantization {quantization}), KV cache {loaded.kv_format}"
    )
