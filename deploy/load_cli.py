"""`signalbox load`: run, report, compare. Reads options, prints, writes files; load/ does the rest."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from deploy.peers_cli import peers
from load import compare as comparing
from load import report as reporting
from load import results
from load.campaign import Campaign, verdict
from load.setup import Options, plans_of, target_of, warmup_of
from load.show import show_run
from load.slo import parse_objectives
from load.summary import Judging, Prices
from load.units import BadOption, LoadError

_ARRIVALS, _CONTENTS, _JUDGING, _RUNNING = "When: arrivals", "What: contents", "Judging", "Running"

_EXAMPLES = """
Examples:

  signalbox load run http://127.0.0.1:8000 --rate 5 --duration 60s --prompt-tokens 512 --output-tokens 128

  signalbox load run URL --concurrency 16 --requests 500 --prompt-tokens lognormal:300,0.8 --output-tokens uniform:9,99

  signalbox load run URL --rate 1 --rate 2 --rate 4 --html sweep.html

  signalbox load run URL --stages 2@30s,2-10@60s,10@30s --slo ttft_p95=500ms --slo itl_p99=80ms

  signalbox load run URL --find-max-rate --slo ttft_p95=500ms --rate 4 --duration 30s

  signalbox load run URL --trace mooncake_conversation.jsonl --length-scale 32 --time-scale 2 --requests 500

  signalbox load run URL --rate 1 --turns uniform:2,6 --shared-prefix 400 --think 2s

  signalbox load run URL --rate 2 --documents 20 --document-tokens 3000 --prompt-tokens 40

Exit status: 0 all well · 1 an objective was missed · 2 an option cannot be read · 3 requests failed or none could be
sent · 4 the generator could not keep up · 130 interrupted. Results are written in every case but the second.
"""


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Load any OpenAI-shaped server honestly: latency from the scheduled send time, intervals, SLOs.",
    epilog=_EXAMPLES,
)


@app.command(epilog=_EXAMPLES)
def run(
    url: Annotated[str, typer.Argument(help="http(s)://host:port, with or without /v1.")],
    model: Annotated[str | None, typer.Option(help="Model to ask; the server's only one if not given.")] = None,
    rate: Annotated[
        list[float] | None, typer.Option(help="Requests a second; repeat for a sweep.", rich_help_panel=_ARRIVALS)
    ] = None,
    arrival: Annotated[
        str, typer.Option(help="constant, poisson or gamma.", rich_help_panel=_ARRIVALS)
    ] = Options.arrival,
    burstiness: Annotated[
        float, typer.Option(help="Shape of --arrival gamma: 1 is Poisson, less is burstier.", rich_help_panel=_ARRIVALS)
    ] = Options.burstiness,
    stages: Annotated[
        str | None, typer.Option(help="Rates over time: 5@30s,5-20@1m (a ramp),20@1m.", rich_help_panel=_ARRIVALS)
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Closed loop: callers that wait for answers.", rich_help_panel=_ARRIVALS)
    ] = None,
    think: Annotated[
        str, typer.Option(help="Pause of a caller, or between turns.", rich_help_panel=_ARRIVALS)
    ] = Options.think,
    duration: Annotated[
        str | None, typer.Option(help="Of the load, as in 60s (default without --requests).", rich_help_panel=_ARRIVALS)
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="How many requests (or conversations).", rich_help_panel=_ARRIVALS)
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Replay: Mooncake .jsonl, Azure .csv, recorded .jsonl.", rich_help_panel=_ARRIVALS),
    ] = None,
    time_scale: Annotated[
        float, typer.Option(help="Replay this many times as fast.", rich_help_panel=_ARRIVALS)
    ] = Options.time_scale,
    length_scale: Annotated[
        int, typer.Option(help="Divide the trace's lengths by this.", rich_help_panel=_ARRIVALS)
    ] = Options.length_scale,
    prompt_tokens: Annotated[
        str,
        typer.Option(
            help="N, normal:MEAN,SD, lognormal:MEDIAN,SIGMA, uniform:LOW,HIGH or empirical:FILE.",
            rich_help_panel=_CONTENTS,
        ),
    ] = Options.prompt_tokens,
    output_tokens: Annotated[
        str, typer.Option(help="max_tokens, the same forms.", rich_help_panel=_CONTENTS)
    ] = Options.output_tokens,
    shared_prefix: Annotated[
        int, typer.Option(min=0, help="Tokens in front that requests share.", rich_help_panel=_CONTENTS)
    ] = 0,
    prefix_groups: Annotated[
        int, typer.Option(min=1, help="How many different shared prefixes.", rich_help_panel=_CONTENTS)
    ] = 1,
    turns: Annotated[
        str | None, typer.Option(help="Chat sessions of so many turns.", rich_help_panel=_CONTENTS)
    ] = None,
    documents: Annotated[
        int | None, typer.Option(min=1, help="Questions about so many documents.", rich_help_panel=_CONTENTS)
    ] = None,
    document_tokens: Annotated[
        str, typer.Option(help="Length of a document.", rich_help_panel=_CONTENTS)
    ] = Options.document_tokens,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts from a file: a line each, or .jsonl.", rich_help_panel=_CONTENTS)
    ] = None,
    token_ids: Annotated[
        int | None,
        typer.Option(
            metavar="VOCAB", help="Prompts as token ids below VOCAB; completions only.", rich_help_panel=_CONTENTS
        ),
    ] = None,
    endpoint: Annotated[str, typer.Option(help="chat or completions.", rich_help_panel=_CONTENTS)] = Options.endpoint,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", rich_help_panel=_CONTENTS)] = True,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Ask for full lengths (vLLM's field).", rich_help_panel=_CONTENTS)
    ] = False,
    extra_body: Annotated[
        str | None, typer.Option(help="JSON merged into every body; null removes.", rich_help_panel=_CONTENTS)
    ] = None,
    slo: Annotated[
        list[str] | None,
        typer.Option(help="ttft_p95=500ms, e2e_mean=2s, error_rate=1%; repeatable.", rich_help_panel=_JUDGING),
    ] = None,
    find_max_rate: Annotated[
        bool, typer.Option("--find-max-rate", help="Search the highest rate within --slo.", rich_help_panel=_JUDGING)
    ] = False,
    precision: Annotated[
        float, typer.Option(min=0.005, max=1, help="Of --find-max-rate.", rich_help_panel=_JUDGING)
    ] = 0.05,
    max_probes: Annotated[int, typer.Option(min=2, help="Of --find-max-rate.", rich_help_panel=_JUDGING)] = 24,
    price_in: Annotated[
        float, typer.Option(min=0, help="USD per million prompt tokens.", rich_help_panel=_JUDGING)
    ] = 0.0,
    price_cached: Annotated[
        float | None, typer.Option(min=0, help="For cached ones, if cheaper.", rich_help_panel=_JUDGING)
    ] = None,
    price_out: Annotated[
        float, typer.Option(min=0, help="USD per million output tokens.", rich_help_panel=_JUDGING)
    ] = 0.0,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json to count the answers with.", rich_help_panel=_JUDGING)
    ] = None,
    warmup: Annotated[
        str, typer.Option(help="auto (MSER-5), none, or a time to leave out.", rich_help_panel=_JUDGING)
    ] = Options.warmup,
    timeout: Annotated[str, typer.Option(help="Of one request.", rich_help_panel=_RUNNING)] = Options.timeout,
    drain: Annotated[
        str, typer.Option(help="Wait for open requests at the end.", rich_help_panel=_RUNNING)
    ] = Options.drain,
    workers: Annotated[
        int, typer.Option(min=1, max=256, help="Generating processes.", rich_help_panel=_RUNNING)
    ] = Options.workers,
    seed: Annotated[
        int, typer.Option(min=0, help="Same seed, same prompts and times.", rich_help_panel=_CONTENTS)
    ] = Options.seed,
    api_key_env: Annotated[
        str | None,
        typer.Option(help="Variable with the key; else SIGNALBOX_API_KEY, OPENAI_API_KEY.", rich_help_panel=_RUNNING),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Do not check the server's certificate.", rich_help_panel=_RUNNING)
    ] = False,
    metrics: Annotated[
        bool, typer.Option("--metrics/--no-metrics", help="Read the server's /metrics.", rich_help_panel=_RUNNING)
    ] = True,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Result file (a name by date).", rich_help_panel=_RUNNING)
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the report there.", rich_help_panel=_RUNNING)] = None,
) -> None:
    """Send load, measure, judge."""
    given = {name: value for name, value in locals().items() if name in Options.__dataclass_fields__}
    options = Options(**given | {"rate": tuple(rate or ())})
    with _clear_errors():
        campaign = _campaign(options, slo or [], Prices(price_in, price_out, price_cached), tokenizer, api_key_env)
        campaign.search(precision, max_probes) if find_max_rate else None
    path = output or Path(time.strftime("signalbox-load-%Y%m%d-%H%M%S.json", time.gmtime()))
    raise typer.Exit(_finish(campaign, path, html))


def _campaign(
    options: Options, slo: list[str], prices: Prices, tokenizer: Path | None, api_key_env: str | None
) -> Campaign:
    objectives = parse_objectives(slo)
    judging = Judging(objectives, prices, warmup_of(options), _counter(tokenizer))
    target = target_of(options, _key(api_key_env))
    plans = plans_of(options, target, keep_text=tokenizer is not None)
    settings = options.as_json() | {"slo": slo} if slo else options.as_json()
    return Campaign(plans, judging, settings, Console(stderr=True))


def _finish(campaign: Campaign, path: Path, html: Path | None) -> int:
    """Run, write after every step, show; the exit status."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    try:
        for document in campaign.run():
            results.write(path, document)
    except LoadError as error:
        results.write(path, campaign.document(failure=str(error)))
        typer.echo(f"signalbox load: {error}", err=True)
        typer.echo(f"results: {path}", err=True)
        return 3
    for one in campaign.shown():
        show_run(console, one)
    if campaign.found is not None:
        console.print(campaign.found_text(), highlight=False)
    typer.echo(f"results: {path}", err=True)
    if html is not None:
        _write_page([(path.name, results.read(path))], html)
    return verdict(campaign)


def _key(variable: str | None) -> str:
    if variable is not None:
        key = os.environ.get(variable, "")
        if not key:
            raise BadOption(f"--api-key-env: the environment has no {variable}")
    else:
        key = os.environ.get("SIGNALBOX_API_KEY") or os.environ.get("OPENAI_API_KEY") or ""
    if not key.isascii() or any(ord(letter) <= 32 for letter in key):
        raise BadOption("the API key in the environment holds a space, a line break or letters outside ASCII")
    return key


def _counter(path: Path | None) -> Callable[[str], int] | None:
    if path is None:
        return None
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise BadOption(f"--tokenizer: cannot read {file}: {error}") from None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


@app.command()
def report(
    files: Annotated[list[Path], typer.Argument(help="Result files of `signalbox load run`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option()] = "signalbox load",
) -> None:
    """Make one HTML page of one or several result files."""
    with _clear_errors():
        _write_page([(path.name, results.read(path)) for path in files], output, title)


def _write_page(documents: list[tuple[str, Any]], path: Path, title: str = "signalbox load") -> None:
    reporting.write(reporting.page(documents, title), path)
    typer.echo(f"report: {path}", err=True)


@app.command()
def compare(
    files: Annotated[list[Path], typer.Argument(help="Result files; the first is the base of all ratios.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the ratios there.")] = None,
) -> None:
    """Show ratios of every figure, with intervals, and what was asked differently."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    with _clear_errors():
        groups = comparing.pairs([(path.name, results.read(path)) for path in files])
        if not any(len(group) > 1 for group in groups):
            raise LoadError("nothing to compare: give two files (with runs of the same label, if they hold several)")
        for group in groups:
            comparing.show(console, group)
        if json_file is not None:
            results.write(json_file, {"comparisons": [one for group in groups for one in comparing.as_json(group)]})


@app.command("peers")
@wraps(peers)
def _peers(**options: Any) -> None:
    with _clear_errors():
        peers(**options)


@contextmanager
def _clear_errors() -> Iterator[None]:
    """One line on stderr: status 2 for what was typed, 3 for what could not be done."""
    try:
        yield
    except LoadError as error:
        typer.echo(f"signalbox load: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, BadOption) else 3) from None


if __name__ == "__main__":
    app()
