"""Several runs towards one result file: a single run, a sweep of rates, or the search for the highest rate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console

from load import results
from load.arrivals import Stage
from load.execute import choose_model, execute
from load.plan import OpenLoop, Plan
from load.search import Search, SearchInterrupted, late, met
from load.show import progress
from load.summary import Judging, summarise
from load.units import BadOption, show_time

Json = dict[str, Any]

# Exit statuses, the gravest last said first: see `verdict`.
WELL, MISSED, FAILED, LATE, INTERRUPTED = 0, 1, 3, 4, 130


@dataclass
class Campaign:
    """plans: (label, plan) in order. `run` yields the result document after every run, so that it can be kept."""

    plans: list[tuple[str, Plan]]
    judging: Judging
    settings: Json
    console: Console
    runs: list[Json] = field(default_factory=list)
    found: Search | None = None

    def search(self, precision: float, most_probes: int) -> None:
        """Turn it into a search, from the first plan's rate up and down. Raises BadOption."""
        if not self.judging.objectives:
            raise BadOption("--find-max-rate needs at least one --slo to meet")
        arrivals = self.plans[0][1].arrivals
        if len(self.plans) != 1 or not isinstance(arrivals, OpenLoop) or len(arrivals.stages) != 1:
            raise BadOption("--find-max-rate starts from one --rate")
        self.found = Search(self._probe, precision, most_probes)

    def run(self) -> Iterator[Json]:
        """Raises LoadError if the server cannot be asked at all."""
        target = self.plans[0][1].target
        model = choose_model(target, target.model or None)
        self.settings["model"] = model
        self.plans = [(label, replace(plan, target=replace(target, model=model))) for label, plan in self.plans]
        if self.found is not None:
            yield from self._search()
            return
        for label, plan in self.plans:
            self._run(label, plan)
            yield self.document()
            if self.runs[-1]["interrupted"]:
                return

    def _run(self, label: str, plan: Plan) -> Json:
        with progress(self.console, plan, label) as update:
            collected = execute(plan, update)
        self.runs.append(summarise(plan, collected, self.judging, label))
        return self.runs[-1]

    # --------------------------------------------------------------------------------------------------------- search

    def _search(self) -> Iterator[Json]:
        assert self.found is not None, "run() asks"
        arrivals = self.plans[0][1].arrivals
        assert isinstance(arrivals, OpenLoop), "search() has checked it"
        try:
            self.found.run(arrivals.stages[0].begin)
        except SearchInterrupted:
            self.found.limited_by = "interrupted"
        except KeyboardInterrupt:
            self.found.limited_by = "interrupted"
            raise
        finally:
            for run in self.runs[:-1]:
                run["requests"] = {}  # the file of twenty probes would be large
        yield self.document()

    def _probe(self, rate: float) -> Json:
        plan = self.plans[0][1]
        arrivals = plan.arrivals
        assert isinstance(arrivals, OpenLoop), "search() has checked it"
        number = len(self.runs) + 1
        duration = arrivals.stages[0].duration_s
        # another seed each time, or a repeat would repeat its luck
        probe = replace(
            plan,
            arrivals=replace(arrivals, stages=(Stage(rate, rate, duration),)),
            seed=plan.seed + number - 1,
            drain_s=min(plan.drain_s, max(duration, 10.0)),
        )
        run = self._run(f"{rate:.4g} requests/s (probe {number})", probe)
        verdicts = "; ".join(
            f"{one['name']} {show_time(one['value']['value']) if one['value']['value'] is not None else '-'}"
            for one in (run["slo"] or {"objectives": []})["objectives"]
            if one["name"] != "error_rate"
        )
        verdict = "met" if met(run) else "void, the generator was late" if late(run) else "missed"
        self.console.print(f"probe {number}: {rate:.4g} requests/s: {verdict} ({verdicts})", highlight=False)
        return run

    def found_text(self) -> str:
        assert self.found is not None, "asked for"
        search = self.found
        if search.found is None:
            return f"[red]no rate found[/]: {search.limited_by}"
        above = f"; {search.above:.4g} is too much" if search.above else ""
        return (
            f"highest rate that meets the objectives: {search.found:.4g} requests/s{above} (limit: {search.limited_by})"
        )

    # --------------------------------------------------------------------------------------------------------- results

    def document(self, failure: str | None = None) -> Json:
        kind = "search" if self.found is not None else "sweep" if len(self.plans) > 1 else "run"
        more: Json = {"failure": failure} if failure else {}
        if self.found is not None:
            more["search"] = {
                "rate": self.found.found,
                "above": self.found.above,
                "limited_by": self.found.limited_by,
                "precision": self.found.precision,
                "slo": [f"{one.name}<={one.bound:g}" for one in self.judging.objectives],
                "probes": self.found.probes,
            }
        return results.document(kind, self.settings, self.runs, **more)

    def shown(self) -> list[Json]:
        """What to print in full: every run; of a search, the last that met the objectives."""
        if self.found is None:
            return self.runs
        good = [run for run, probe in zip(self.runs, self.found.probes, strict=False) if probe["met"]]
        return good[-1:]


def verdict(campaign: Campaign) -> int:
    """The exit status: interrupted, then failures, then a generator that was late, then missed objectives."""
    runs = campaign.runs
    if any(run["interrupted"] for run in runs):
        return INTERRUPTED
    if campaign.found is not None:
        return WELL if campaign.found.found is not None else MISSED
    if not runs or any(run["stopped"] or run["counts"]["all"]["failed"] for run in runs):
        return FAILED
    if not all(run["generator"]["kept_up"] for run in runs):
        return LATE
    return WELL if all(run["slo"] is None or run["slo"]["met"] for run in runs) else MISSED
