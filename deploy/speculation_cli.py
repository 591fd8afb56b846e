"""`signalbox train-heads` and `signalbox distill-draft`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from replicas.engine.spec.make import Material, Progress

Model = Annotated[str, typer.Argument(help="Catalogue name, Hugging Face id, folder or .gguf file.")]
Texts = Annotated[
    list[Path] | None,
    typer.Option("--text", help="Plain text to ask about, or JSON lines with a user's message as prompt; repeatable."),
]
Questions = Annotated[bool, typer.Option("--questions/--no-questions", help="Ask the built-in questions too.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the artefact; an interrupted run goes on from there.")]
Tokens = Annotated[int, typer.Option(min=100, help="Tokens that the model writes itself, to learn from.")]
Targets = Annotated[int, typer.Option(min=16, help="How many of the most frequent tokens can be guessed.")]


def train_heads(
    model: Model,
    out: Out,
    text: Texts = None,
    questions: Questions = True,
    tokens: Tokens = 300_000,
    targets: Targets = 4096,
    heads: Annotated[int, typer.Option(min=1, max=16, help="Guesses ahead.")] = 4,
    independent: Annotated[
        bool, typer.Option("--independent", help="Heads as in Medusa's paper: none sees the tokens guessed before.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1)] = 600,
    batch: Annotated[int, typer.Option(min=1, help="Positions in one step.")] = 512,
) -> None:
    """Train Medusa heads for a model from what it writes itself."""
    from replicas.engine.spec.make import make_heads

    with _material(model, out, text or [], questions, tokens, targets) as (material, progress):
        right = make_heads(
            material, num_heads=heads, sequential=not independent, steps=steps, batch=batch, progress=progress
        )
    typer.echo(f"wrote {out}; on text held out the first 1, 2, … guesses are all right in")
    typer.echo("  ".join(f"{share:.1%}" for share in right))


def distill_draft(
    model: Model,
    out: Out,
    text: Texts = None,
    questions: Questions = True,
    layers: Annotated[int, typer.Option("--layers", min=1, help="How many of the model's layers to begin with.")] = 2,
    states: Annotated[
        bool, typer.Option("--states", help="Let it read the model's last hidden states too, as EAGLE does.")
    ] = False,
    depth: Annotated[int, typer.Option(min=1, max=8, help="With --states: guesses ahead to train for.")] = 3,
    tokens: Tokens = 300_000,
    targets: Targets = 4096,
    steps: Annotated[int, typer.Option(min=1)] = 300,
    batch: Annotated[int, typer.Option(min=1, help="Samples in one step.")] = 8,
) -> None:
    """Make a small draft model from some of a model's own layers, sharing its embedding and output layer."""
    from replicas.engine.spec.make import last_layers, make_draft, make_state_draft, spread_layers
    from replicas.engine.weights import open_checkpoint

    with _material(model, out, text or [], questions, tokens, targets) as (material, progress):
        held = open_checkpoint(material.model).config.num_layers
        if states:
            chosen = last_layers(held, layers)
            right = make_state_draft(material, layers=chosen, depth=depth, steps=steps, batch=batch, progress=progress)
        else:
            chosen = spread_layers(held, layers)
            right = [make_draft(material, layers=chosen, steps=steps, batch=batch, progress=progress)]
    shares = "  ".join(f"{share:.1%}" for share in right)
    typer.echo(f"wrote {out} from layers {', '.join(map(str, chosen))}; on text held out guesses are all right in")
    typer.echo(f"{shares} (the first{', two, …' if states else ''})")


@contextmanager
def _material(
    model: str, out: Path, texts: list[Path], ask: bool, tokens: int, targets: int
) -> Iterator[tuple[Material, Progress]]:
    """What to learn from, and bars on stderr, one a stage."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    from deploy.models import pull
    from replicas.engine.spec.make import Material

    source = str(pull(model))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    from rich.console import Console

    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks = {}

        def progress(stage: str, done: int, total: int, note: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total, description=f"{stage} ({note})")

        yield (
            Material(
                model=source, texts=tuple(texts), frame=_frame(source), out=out, ask=ask, tokens=tokens, targets=targets
            ),
            progress,
        )


def _frame(source: str) -> tuple[str, str]:
    """What the model's chat template puts before and after a user's message; both "" if it has none."""
    from gateway.template import ChatTemplate
    from replicas.engine.tokenizer import Tokenizer
    from replicas.engine.weights import open_checkpoint

    tokenizer = Tokenizer.load(open_checkpoint(source))
    if not tokenizer.chat_template:
        return "", ""
    mark = "signalbox-message"
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
    before, _, after = template.render([{"role": "user", "content": mark}]).partition(mark)
    return before, after
