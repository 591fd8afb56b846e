"""The policy document: which model answers to which name, how it is chosen, and what the gateways do besides.

    text ─ yaml_text.read ─► data ─ the sections below ─► PolicyDocument ─ names known to the fleet? ─► accepted

Frozen values; the empty document is valid and means every model by its own name, replicas chosen by affinity.
docs/policies.md explains every key.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from policies import yaml_text
from policies.canary import DEFAULT_SALT
from policies.document_limits import Admission, Budget, Hedging, Priorities, RateLimit, RetryRules
from policies.rightsize import cascade as cascades
from policies.rightsize.choose import RightSizeView, Trade
from policies.rightsize.guarantee import Promise
from policies.rightsize.predictor import ArtefactError, Predictor
from policies.section import Dollars, Listed, Name, Section, Share
from policies.yaml_text import DocumentError, Loc, suggestion
from replicas.protocol import ConfigError

Wrong = tuple[Loc, str]


class Prices(Section):
    """US dollars per million tokens; what is left out is as the fleet file says."""

    input: Dollars | None = None
    cached_input: Dollars | None = None
    output: Dollars | None = None


class ModelRules(Section):
    """What is declared of one model. strength stands for its quality where no predictor is trained: 0 .. 1."""

    price: Prices = Prices()
    strength: Annotated[float, Field(ge=0, le=1)] | None = None


class PredictorFile(Section):
    """A folder made by `signalbox policy train`. path: as the gateways see it; relative to their predictor folder.

    sha256: of predictor.json, which names that of the arrays; so all gateways run the same predictor or none.
    """

    path: Annotated[str, Field(min_length=1, max_length=1024)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _default(of: type, name: str) -> Any:
    """A default is written once: with the code that it belongs to."""
    return next(field.default for field in dataclasses.fields(of) if field.name == name)


class RightSize(Section):
    """Choice of model by predicted quality against price; exactly one of cost_weight and quality_floor.

    cost_weight: predicted quality one is ready to lose to save one dollar per thousand requests. quality_floor: the
    cheapest model that is predicted to reach it.
    """

    predictor: PredictorFile | None = None
    cost_weight: Annotated[float, Field(ge=0)] | None = None
    quality_floor: Annotated[float, Field(ge=0, le=1)] | None = None
    expected_output_tokens: Annotated[float, Field(gt=0)] = _default(RightSizeView, "expected_output_tokens")

    @model_validator(mode="after")
    def _one_trade(self) -> Self:
        if (self.cost_weight is None) == (self.quality_floor is None):
            raise ValueError("needs exactly one of cost_weight and quality_floor")
        return self

    @property
    def trade(self) -> Trade:
        return Trade(cost_weight=self.cost_weight, quality_floor=self.quality_floor)


class Cascade(Section):
    """The small model answers; below this mean log-probability of its tokens the strong one does."""

    small: Name
    strong: Name
    min_mean_logprob: Annotated[float, Field(le=0)]

    @property
    def rule(self) -> cascades.Cascade:
        return cascades.Cascade(self.small, self.strong, self.min_mean_logprob)


class Guarantee(Section):
    """A share of routed-down requests also runs on the strong model, in the background, within a budget."""

    strong: Name
    agreement: Annotated[float, Field(ge=0, le=1)] = _default(Promise, "agreement")
    error: Annotated[float, Field(gt=0, lt=1)] = _default(Promise, "error")
    share: Share = _default(Promise, "share")
    usd_per_day: Dollars = _default(Promise, "budget")

    @property
    def promise(self) -> Promise:
        return Promise(
            strong=self.strong,
            agreement=self.agreement,
            error=self.error,
            share=self.share,
            budget=self.usd_per_day,
        )


class Session(Section):
    """keep_model: a conversation stays with the model that answered its first turn while it pauses less than idle_s.

    By what a conversation is known: `gateway.sessions`.
    """

    keep_model: bool = False
    idle_s: Annotated[float, Field(gt=0)] = 900.0


class Group(Section):
    """Several models under one name. Without right_size and cascade: the first of them that has a ready replica."""

    models: Annotated[tuple[Name, ...], Listed, Field(min_length=1, max_length=64)]
    right_size: RightSize | None = None
    cascade: Cascade | None = None
    guarantee: Guarantee | None = None
    session: Session | None = None


class Affinity(Section):
    """How a replica is chosen among those of a model."""

    policy: Literal["affinity", "cache_aware", "least_load", "power_of_two", "round_robin"] = "affinity"


class Canary(Section):
    """This generation begins with a share of the API keys. Another salt draws other keys."""

    share: Share
    salt: Annotated[str, Field(max_length=64)] = DEFAULT_SALT


class PolicyDocument(Section):
    """The whole document."""

    models: Mapping[Name, ModelRules] = {}
    groups: Mapping[Name, Group] = {}
    aliases: Mapping[Name, Name] = {}
    affinity: Affinity = Affinity()
    fallbacks: Mapping[Name, Annotated[tuple[Name, ...], Listed, Field(min_length=1, max_length=16)]] = {}
    canary: Canary | None = None
    priorities: Priorities | None = None
    budgets: Annotated[tuple[Budget, ...], Listed] = ()
    rate_limits: Annotated[tuple[RateLimit, ...], Listed] = ()
    admission: Admission | None = None
    retries: RetryRules | None = None
    hedging: Mapping[Name, Hedging] = {}

    def target(self, name: str) -> str | Group:
        """What a name that a caller gave stands for: a group, or the name of a model (not checked to exist)."""
        name = self.aliases.get(name, name)
        return self.groups.get(name, name)

    def normalised(self) -> str:
        """What the author states, nothing that is left to a default, as JSON with sorted keys."""
        return json.dumps(self.model_dump(mode="json", exclude_unset=True), sort_keys=True, ensure_ascii=False)


EMPTY = PolicyDocument()


@dataclasses.dataclass(frozen=True, slots=True)
class FleetNames:
    """What the fleet serves: names proper, the fleet file's aliases of them, and which of them are upstreams."""

    models: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    upstreams: tuple[str, ...] = ()


def parse(text: str, name: str = "policy", *, names: FleetNames | None = None) -> PolicyDocument:
    """The document in `text`; DocumentError with the line and path of everything that is wrong.

    `name` stands for the text in messages. names: where given, every model that the document names must be one of them,
    and fit for what it is named for.
    """
    source = yaml_text.read(text, name)
    try:
        document = PolicyDocument.model_validate(source.data)
    except ValidationError as error:
        raise source.explain_validation(error, PolicyDocument) from None
    wrong = [*_contradictions(document)]
    if names is not None:
        wrong += [*_unknown_names(document, names), *_unfit(document, names)]
    if wrong:
        raise source.explain(wrong)
    return document


def checked(text: str, name: str, *, names: FleetNames | None = None, predictors: Path | None = None) -> PolicyDocument:
    """`parse`, and in the folder `predictors`, where given, every predictor that the document names must be found."""
    document = parse(text, name, names=names)
    if predictors is not None:
        try:
            load_predictors(document, predictors)
        except PredictorUnusable as error:
            raise with_lines(text, name, error) from None
    return document


MAX_READ = yaml_text.MAX_BYTES + 4  # of a file; what is larger is then refused by `parse`


def read_text(path: Path) -> str:
    """A document's file; ConfigError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return decode(file.read(MAX_READ), str(path))
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror}") from None


def decode(content: bytes, name: str) -> str:
    try:
        # cut off inside a character it is too large, whatever its last bytes are
        return content.decode(errors="strict" if len(content) < MAX_READ else "replace")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DocumentError(name, [yaml_text.Mistake(line, "", "is not UTF-8")]) from None


# --------------------------------------------------------------------------------------------- what pydantic cannot see


def _contradictions(document: PolicyDocument) -> Iterator[Wrong]:
    for name, group in document.groups.items():
        yield from (((*("groups", name), *loc), message) for loc, message in _group_contradictions(group))
    for name, target in document.aliases.items():
        if name in document.groups:
            yield ("aliases", name), f"{name!r} is a group already"
        if target in document.aliases:
            yield ("aliases", name), f"{target!r} is an alias itself; name what it stands for"
    yield from _fallback_contradictions(document)
    if document.priorities is not None:
        yield from ((("priorities", *loc), message) for loc, message in _unknown_classes(document.priorities))
    for name, hedging in document.hedging.items():
        if hedging.to == name:
            yield ("hedging", name, "to"), "must be another model; without it another replica is asked"


def _fallback_contradictions(document: PolicyDocument) -> Iterator[Wrong]:
    for name, models in document.fallbacks.items():
        yield from _repeated(models, ("fallbacks", name))
        if name in models:
            yield ("fallbacks", name, models.index(name)), "a model cannot stand in for itself"
        for index, model in enumerate(models):
            if model in document.groups or model in document.aliases:
                yield ("fallbacks", name, index), f"{model!r} is no model's own name"


def _unknown_classes(priorities: Priorities) -> Iterator[Wrong]:
    named: list[tuple[Loc, str]] = [(("default",), priorities.default)]
    for section in ("keys", "teams", "models"):
        named += [((section, name), kind) for name, kind in getattr(priorities, section).items()]
    named += [(("tiers", name, "to"), tier.to) for name, tier in priorities.tiers.items()]
    for loc, kind in named:
        if kind not in priorities.classes:
            yield loc, f"{kind!r} is not among the classes; {suggestion(kind, priorities.classes)}"


def _group_contradictions(group: Group) -> Iterator[Wrong]:
    yield from _repeated(group.models, ("models",))
    cascade, guarantee = group.cascade, group.guarantee
    parts = [("cascade", "small", cascade.small), ("cascade", "strong", cascade.strong)] if cascade else []
    parts += [("guarantee", "strong", guarantee.strong)] if guarantee else []
    for section, key, model in parts:
        if model not in group.models:
            yield (section, key), f"{model!r} is not among the group's models; {suggestion(model, group.models)}"
    if cascade and cascade.small == cascade.strong:
        yield ("cascade", "strong"), "must be another model than small"
    if guarantee and group.right_size is None:
        yield ("guarantee",), "needs right_size: it moves that trade towards quality"


def _repeated(models: tuple[str, ...], loc: Loc) -> Iterator[Wrong]:
    for index, model in enumerate(models):
        if model in models[:index]:
            yield (*loc, index), f"{model!r} is listed twice"


def _unknown_names(document: PolicyDocument, names: FleetNames) -> Iterator[Wrong]:
    taken = {*names.models, *names.aliases}
    for section, own in (("groups", document.groups), ("aliases", document.aliases)):
        yield from (((section, name), f"the fleet has a model or alias {name!r}") for name in own if name in taken)
    for loc, model in _models_named(document):
        if model not in names.models:
            yield loc, f"the fleet has no model {model!r}; {suggestion(model, names.models)}"
    targets = (*names.models, *document.groups)
    for name, target in document.aliases.items():
        if target not in targets:
            yield ("aliases", name), f"there is no model or group {target!r}; {suggestion(target, targets)}"


def _unfit(document: PolicyDocument, names: FleetNames) -> Iterator[Wrong]:
    """Upstreams where only our own replicas will do."""
    for name, group in document.groups.items():
        if group.cascade is not None and group.cascade.small in names.upstreams:
            small = group.cascade.small
            yield ("groups", name, "cascade", "small"), f"{small!r} is an upstream: how sure it is is not known"
    for name, hedging in document.hedging.items():
        if hedging.to is None and name in names.upstreams:
            yield ("hedging", name), "an upstream has no other replica; name another model in 'to'"


def _models_named(document: PolicyDocument) -> Iterator[tuple[Loc, str]]:
    yield from ((("models", name), name) for name in document.models)
    for name, group in document.groups.items():
        yield from ((("groups", name, "models", index), model) for index, model in enumerate(group.models))
    yield from _models_in_limits(document)
    for name, models in document.fallbacks.items():
        yield ("fallbacks", name), name
        yield from ((("fallbacks", name, index), model) for index, model in enumerate(models))


def _models_in_limits(document: PolicyDocument) -> Iterator[tuple[Loc, str]]:
    for section, rules in (("budgets", document.budgets), ("rate_limits", document.rate_limits)):
        for index, rule in enumerate(rules):
            if rule.model is not None and rule.model != "*":
                yield (section, index, "model"), rule.model
    for index, budget in enumerate(document.budgets):
        if budget.downgrade is not None:
            yield ("budgets", index, "downgrade", "to"), budget.downgrade.to
    for section in ("priorities", "admission", "retries"):
        own = getattr(document, section)
        yield from (((section, "models", model), model) for model in (own.models if own else ()))
    for model, hedging in document.hedging.items():
        yield ("hedging", model), model
        if hedging.to is not None:
            yield ("hedging", model, "to"), hedging.to


# ----------------------------------------------------------------------------------------------------------- predictors


class PredictorUnusable(ArtefactError):
    """A predictor that a document names cannot be used on this machine; `loc` is where the document names it."""

    def __init__(self, loc: Loc, message: str) -> None:
        super().__init__(f"{yaml_text.path_text(loc)}: {message}")
        self.loc = loc
        self.reason = message


def load_predictors(document: PolicyDocument, folder: Path) -> dict[str, Predictor]:
    """The predictor of every group that has one, by the group's name. Relative paths are below `folder`.

    Raises PredictorUnusable. Blocking: some tens of milliseconds each.
    """
    predictors: dict[str, Predictor] = {}
    for name, group in document.groups.items():
        file = group.right_size.predictor if group.right_size else None
        if file is not None:
            try:
                predictors[name] = _load_predictor(file, folder / file.path, group.models)
            except ArtefactError as error:
                raise PredictorUnusable(("groups", name, "right_size", "predictor"), error.message) from None
    return predictors


def _load_predictor(file: PredictorFile, folder: Path, models: tuple[str, ...]) -> Predictor:
    predictor = Predictor.load(folder)
    if not set(models) & set(predictor.models):
        raise ArtefactError(f"it was trained on {', '.join(predictor.models)}: none of the group's models")
    found = hashlib.sha256((folder / "predictor.json").read_bytes()).hexdigest()
    if found != file.sha256:
        raise ArtefactError(f"the predictor there has the sha256 {found}, not {file.sha256}")
    return predictor


def with_lines(text: str, name: str, error: PredictorUnusable) -> DocumentError:
    """The same refusal with the line at which `text`, a valid document, names the predictor."""
    return yaml_text.read(text, name).explain([(error.loc, error.reason)])
