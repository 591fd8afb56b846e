"""`signalbox policy validate | diff | publish | rollback | promote | cancel | history | show | audit | schema`.

They work on the gateway's database, whether or not an instance runs. A refusal is one line per mistake on stderr and
exit status 1; nothing has changed then.
"""

from __future__ import annotations

import getpass
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy import instance, paths

if TYPE_CHECKING:
    from gateway.generations import AuditEntry
    from gateway.policy_register import Change, PolicyRegister
    from policies.document import FleetNames, PolicyDocument

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Document = Annotated[str, typer.Argument(metavar="FILE", help="Policy document (YAML); - reads standard input.")]
Database = Annotated[
    str,
    typer.Option(
        envvar="SIGNALBOX_DATABASE",
        help="SQLAlchemy URL of the gateway's database; by default the running instance's, or the file in its home.",
    ),
]
FleetFile = Annotated[
    Path | None, typer.Option("--fleet", help="Check names against this fleet file while no gateway runs.")
]
Author = Annotated[str, typer.Option("--as", help="Who is doing it, for the audit log; by default you.")]
Why = Annotated[str, typer.Option("--why", help="The reason, for history and audit log.")]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no such user id, as in some containers
        return "unknown"


def database_url(given: str = "") -> str:
    """The database of this home's gateways: as given, else the running instance's, else where one would have it."""
    if given:
        return given
    record = instance.running()
    return record.database if record is not None and record.database else paths.database_url()


def _names(fleet: Path | None) -> FleetNames | None:
    if fleet is None:
        return None
    from deploy.fleet import load
    from policies.document import FleetNames

    found = load(fleet)
    return FleetNames(
        tuple(model.name for model in found.models),
        tuple(alias for model in found.models for alias in model.aliases),
        tuple(upstream.name for upstream in found.upstreams),
    )


def register_of(database: str, fleet: Path | None = None) -> PolicyRegister:
    from gateway.policy_register import PolicyRegister

    url = database_url(database)
    # the predictors of gateways elsewhere are not to be found here
    predictors = paths.state_dir() / "predictors" if url.startswith("sqlite") else None
    return PolicyRegister(url, names=_names(fleet), predictors=predictors)


def _read(document: str) -> tuple[str, str]:
    """(text, what to call it)."""
    from policies import document as documents

    if document == "-":
        return documents.decode(sys.stdin.buffer.read(documents.MAX_READ), "standard input"), "standard input"
    return documents.read_text(Path(document)), document


def _share(text: str) -> float:
    """5%, 5 % or 0.05."""
    try:
        percent = text.strip().endswith("%")
        share = float(text.strip().removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise typer.BadParameter(f"{text!r} is no share: write 5% or 0.05, above 0 and at most 100%")
    return share


@app.command()
def validate(file: Document, fleet: FleetFile = None, database: Database = "") -> None:
    """Check a document; against --fleet or the running gateways where there are any. Changes nothing."""
    text, name = _read(file)
    document, checked = _check(text, name, fleet, database)
    unchecked = "" if checked else " (no gateway runs and no --fleet is given: names of models were not checked)"
    typer.echo(f"{name} is valid: {_summary(document)}{unchecked}")


def _check(text: str, name: str, fleet: Path | None, database: str) -> tuple[PolicyDocument, bool]:
    """(the document, whether the names of its models were checked). Makes no database where there is none."""
    from policies.document import checked

    if fleet is not None:
        return checked(text, name, names=_names(fleet), predictors=paths.state_dir() / "predictors"), True
    if database or instance.running() is not None:
        with register_of(database) as register:
            return register.validate(text, name), bool(register.gateways())
    return checked(text, name, predictors=paths.state_dir() / "predictors"), False


def _summary(document: PolicyDocument) -> str:
    sections = {name: getattr(document, name) for name in ("models", "groups", "aliases")}
    named = [f"{name} {', '.join(entries)}" for name, entries in sections.items() if entries]
    return "; ".join([*named, f"replicas by {document.affinity.policy}"])


@app.command()
def diff(file: Document, fleet: FleetFile = None, database: Database = "") -> None:
    """What a document would change of the active generation: "-" gone, "+" new, "~" changed."""
    text, name = _read(file)
    with register_of(database, fleet) as register:
        _print_changes(register.diff(text, name))


@app.command()
def publish(
    file: Document,
    author: Author = "",
    why: Why = "",
    canary: Annotated[
        str | None, typer.Option("--canary", help="Begin with this share of the keys, e.g. 5%; 100% is everybody.")
    ] = None,
    parent: Annotated[
        int | None, typer.Option("--parent", help="Refuse unless this generation is the active one.")
    ] = None,
    gate: Annotated[
        str | None,
        typer.Option("--gate", help='Refuse it where recorded traffic says so: "cost<=+0% ttft_p95<=+10%".'),
    ] = None,
    since: Annotated[str, typer.Option(help="How much recorded traffic the gate looks at.")] = "1d",
    replica: Annotated[
        list[str] | None, typer.Option(metavar="NAME=MODEL.json", help="For the gate: a calibrated model.")
    ] = None,
    fleet: FleetFile = None,
    database: Database = "",
) -> None:
    """Make a document serve. Returns when every live gateway serves by it; requests that run keep what they have."""
    share = _share(canary) if canary is not None else None
    text, name = _read(file)
    detail = ""
    with register_of(database, fleet) as register:
        who = author or _user()
        if gate is not None:
            from deploy.replay_cli import pass_gate, setting_of
            from policies.gate import GateError, parse_gate

            try:
                parse_gate(gate)
            except GateError as error:
                raise typer.BadParameter(str(error), param_hint="--gate") from None
            register.validate(text, name)
            detail = pass_gate(register, text, gate, setting_of(since, None, fleet, replica), who, share)
        change = register.publish(text, name=name, author=who, why=why, canary=share, parent=parent, detail=detail)
    _print_changed(change)


@app.command()
def rollback(
    generation: Annotated[
        int | None,
        typer.Argument(help="By default: end the canary or, without one, go to what was active before this one."),
    ] = None,
    author: Author = "",
    why: Why = "",
    database: Database = "",
) -> None:
    """Serve by an earlier generation again."""
    with register_of(database) as register:
        change = register.rollback(author=author or _user(), why=why, to=generation)
    _print_changed(change)


@app.command()
def promote(
    share: Annotated[str, typer.Argument(help="Share of the keys that the canary serves from now on.")] = "100%",
    author: Author = "",
    why: Why = "",
    database: Database = "",
) -> None:
    """Serve more keys by the canary, or all. A larger share takes no key out."""
    wanted = _share(share)
    with register_of(database) as register:
        change = register.promote(author=author or _user(), why=why, share=wanted)
    _print_changed(change)


@app.command()
def cancel(author: Author = "", why: Why = "", database: Database = "") -> None:
    """End the canary: the active generation serves everybody."""
    with register_of(database) as register:
        change = register.cancel(author=author or _user(), why=why)
    _print_changed(change)


@app.command()
def history(
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    database: Database = "",
) -> None:
    """The generations, newest first, and what serves."""
    from dataclasses import asdict

    with register_of(database) as register:
        entries = register.history(limit)
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in entries], indent=2))
        return
    rows = [
        (f"{e.number}", e.state + (f" {e.share:.4g}" if 0 < e.share < 1 else ""), e.author, when(e.created_at), e.note)
        for e in entries
    ]
    table(("generation", "state", "author", "published", "why"), rows)


@app.command()
def show(
    generation: Annotated[int | None, typer.Argument(help="The active one by default.")] = None,
    database: Database = "",
) -> None:
    """Print a generation's document as it was given."""
    with register_of(database) as register:
        found = register.active() if generation is None else register.show(generation)
    typer.echo(f"# generation {found.number}, {found.author}, {when(found.created_at)}", err=True)
    typer.echo(found.document, nl=not found.document.endswith("\n"))


@app.command()
def audit(
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, with the differences, instead of a table.")] = False,
    database: Database = "",
) -> None:
    """Every change that was made or tried: who, when, what, why."""
    from dataclasses import asdict

    with register_of(database) as register:
        entries = register.audit(limit)
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in entries], indent=2))
        return
    rows = [(when(e.at), e.actor, e.action, e.target, e.outcome, _reason(e)) for e in entries]
    table(("when", "who", "action", "what", "outcome", "why"), rows)


def _reason(entry: AuditEntry) -> str:
    """What went wrong; else why it was done, and the gate that it passed."""
    if entry.outcome != "done":
        return entry.detail
    gate = f"gate {json.loads(entry.detail)['gate']}" if entry.detail.startswith("{") else ""
    return "; ".join(filter(None, (entry.why, gate)))


@app.command()
def schema() -> None:
    """Print the JSON Schema of the document, for editors."""
    from policies.document_schema import schema_text

    typer.echo(schema_text(), nl=False)


def _print_changes(lines: Sequence[str]) -> None:
    typer.echo("\n".join(lines) if lines else "no difference")


def _print_changed(change: Change) -> None:
    _print_changes(change.diff)
    switch = change.switch
    what = f"generation {switch.active} serves"
    if switch.canary is not None:
        what = f"generation {switch.canary} serves {switch.share:.4g} of the keys, {switch.active} the others"
    where = (
        f"{len(change.gateways)} gateway{'s' * (len(change.gateways) != 1)}" if change.gateways else "no gateway runs"
    )
    typer.echo(f"{what} ({where})")
    if change.late_s > 0:
        typer.echo(f"a gateway learned of it {change.late_s * 1e3:.0f} ms late", err=True)
    for one in change.unanswered:
        typer.echo(f"gateway {one} has not confirmed it; it serves nobody until it has", err=True)


def when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if seconds else "-"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(*columns)
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))  # what people wrote is no markup
    Console().print(shown)
