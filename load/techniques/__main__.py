"""What each technique brings: off and on, in turns on the same traffic, beside what is published of it.

    python -m load.techniques [--azure azure_2023_conv.csv] [--mooncake mooncake_conversation.jsonl]
                              [--scores llmrouter_scores.jsonl --prices llmrouter_prices.json]
                              [--text wikitext2_valid.txt]
    python -m load.techniques --only prefix-cache --only int8      # some rows; others of DIR stay
    python -m load.techniques --show --from docs/techniques.json   # the table of a file, nothing measured
    python -m load.techniques --show --readme README.md            # and into README.md, between its two marks

Without a file a smaller built-in workload takes its place, and the table says so. Rows that are done are kept in
DIR/techniques.json: the same command goes on where it was interrupted, --again measures everything anew. The
report is DIR/techniques.html. Sizes are chosen for two CPU cores and some 20 minutes; let nothing else run meanwhile.

Exit status: 0 all measured · 1 a technique that must not change the answers did · 2 an option cannot be read · 3 a row
could not be measured · 130 interrupted.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from load import results
from load.techniques import affinity, right_size, show
from load.techniques.catalogue import NOT_BUILT, TECHNIQUES
from load.techniques.figures import broken
from load.techniques.measure import Options, read, run
from load.units import BadOption, LoadError

MODEL, DRAFT = "smollm2-135m-instruct", "smollm2-135m-instruct-draft"
_NAMES = tuple(one.name for one in TECHNIQUES if one.kind != NOT_BUILT)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m load.techniques", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Options(Path(), Path("build/techniques"))
    parser.add_argument(
        "--model", type=Path, help=f"folder or .gguf file (what `signalbox models pull {MODEL}` prints)"
    )
    parser.add_argument(
        "--draft", type=Path, metavar="DIR", help="of `signalbox distill-draft` (of the default model: ours)"
    )
    parser.add_argument("--azure", type=Path, metavar="CSV", help="Azure trace: output lengths of batching")
    parser.add_argument("--mooncake", type=Path, metavar="JSONL", help="Mooncake trace: shared prefixes of affinity")
    parser.add_argument("--scores", type=Path, metavar="JSONL", help="score table of right-size, with --prices")
    parser.add_argument("--prices", type=Path, metavar="JSON", help="USD per million tokens of its models")
    parser.add_argument("--text", type=Path, help="UTF-8 text: calibration of INT4 and perplexity")
    parser.add_argument(
        "--dir", type=Path, default=default.folder, help=f"what is measured and made ({default.folder})"
    )
    parser.add_argument(
        "--only", action="append", choices=_NAMES, metavar="ROW", help=f"repeatable: {', '.join(_NAMES)}"
    )
    parser.add_argument("--turns", type=int, default=default.turns, help=f"of each side ({default.turns})")
    parser.add_argument(
        "--usd-per-hour", type=float, default=default.usd_per_hour, help=f"of this machine ({default.usd_per_hour:g})"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only shows that everything runs")
    parser.add_argument("--again", action="store_true", help="measure also what is there")
    parser.add_argument("--show", action="store_true", help="measure nothing, show what is there")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="JSON", help="with --show: that file instead of DIR's"
    )
    parser.add_argument("--readme", type=Path, nargs="?", const=Path("README.md"), help="also write the table into it")
    return parser


def options_of(args: argparse.Namespace) -> Options:
    """Raises BadOption, before anything is measured."""
    if args.turns < 1:
        raise BadOption(f"--turns must be at least 1, got {args.turns}")
    if not args.usd_per_hour > 0:
        raise BadOption(f"--usd-per-hour must be greater than 0, got {args.usd_per_hour:g}")
    if (args.scores is None) != (args.prices is None):
        raise BadOption("--scores and --prices go together")
    if args.source and not args.show:
        raise BadOption("--from goes with --show")
    for name in ("model", "draft", "azure", "mooncake", "scores", "prices", "text"):
        path = getattr(args, name)
        if path is not None and not path.exists():
            raise BadOption(f"--{name} {path} does not exist")
    affinity.traffic(args.mooncake, 10)
    if args.scores:
        right_size.read_table(args.scores, args.prices)
    model, draft = args.model, args.draft
    if model is None:
        model = Path(MODEL) if args.show else _pulled(MODEL)
        draft = draft or (Path(DRAFT) if args.show else _pulled(DRAFT))
    names = ("azure", "mooncake", "scores", "prices", "text", "turns", "usd_per_hour", "quick", "again")
    given: dict[str, Any] = {name: getattr(args, name) for name in names}
    return Options(model, args.dir, draft=draft, rows=tuple(args.only or _NAMES), **given)


def _pulled(name: str) -> Path:
    """The folder of what has this name, fetched if it is not there."""
    command = [sys.executable, "-m", "deploy.cli", "models", "pull", name]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise LoadError(f"`signalbox models pull {name}` failed; name a model with --model")
    return Path(done.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        options = options_of(args)
        file = options.folder / "techniques.json"
        if args.show:
            document = read(args.source or file)
        else:
            for document in run(options, console):
                results.write(file, document)
                file.with_suffix(".html").write_text(show.page(document), encoding="utf-8")
            console.print(f"wrote {file} and {file.with_suffix('.html')}", highlight=False)
        if args.readme:
            show.into(args.readme, document)
    except LoadError as error:
        print(f"techniques: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with the row that was being measured", file=sys.stderr)
        return 130
    console.print(show.terminal(document))
    faults = [broken(row) for row in document["rows"]]
    return 3 if any("failed" in row for row in document["rows"]) else 1 if any(faults) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a fleet that a row has started is taken down first
    sys.exit(main())
