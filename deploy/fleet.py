"""The fleet file: which models are served, by how many replicas of what size, behind which gateway.

YAML, validated once, here. Unknown and repeated keys are refused with their line, their path and the nearest known
name; what is not built yet is refused by name. Engine settings are the fields of the engine's own configuration: a
default is written there and nowhere else.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from gateway.config import LEASE_S, GatewayConfig, Limits, Retries, ServedModel, Traffic
from policies import prices, yaml_text
from replicas.engine.config import EngineConfig
from replicas.engine.spec.config import Speculative
from replicas.fake import FakeSettings
from replicas.protocol import ConfigError
from replicas.upstream_config import Upstream, UpstreamTimeouts, check_base_url

FLEETS = Path(__file__).parent / "fleets"
DEFAULT_FLEET = FLEETS / "default.yaml"

T = TypeVar("T")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def _section(name: str, config: type, *, without: tuple[str, ...] = ()) -> type[_Section]:
    """A section with exactly the fields of a configuration dataclass; only what a file sets is passed on."""
    hints = typing.get_type_hints(config)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if field.name not in without:
            default = ... if field.default is dataclasses.MISSING else field.default
            fields[field.name] = (hints[field.name], default)
    return create_model(name, __base__=_Section, __doc__=(config.__doc__ or "").split("\n")[0], **fields)


def _given(section: BaseModel | None) -> dict[str, Any]:
    """What the file sets itself; the rest is left to the defaults where they are written."""
    return section.model_dump(exclude_unset=True) if section is not None else {}


SpeculativeSettings = _section("SpeculativeSettings", Speculative)
_Engine = _section("_Engine", EngineConfig, without=("model", "speculative"))


class EngineSettings(_Engine):  # type: ignore[valid-type, misc]
    """Settings of our own engine."""

    speculative: SpeculativeSettings | None = None  # type: ignore[valid-type]

    @field_validator("speculative")
    @classmethod
    def _speculative(cls, given: BaseModel | None) -> BaseModel | None:
        if given is not None:
            _checked(Speculative, **_given(given))
        return given


FakeEngineSettings = _section("FakeEngineSettings", FakeSettings)
GatewayLimits = _section("GatewayLimits", Limits)
GatewayRetries = _section("GatewayRetries", Retries)
GatewayTraffic = _section("GatewayTraffic", Traffic)


# The bounds of a single answer are not for a fleet file; what the groups have anyway is theirs.
UpstreamSettings = _section(
    "UpstreamSettings",
    Upstream,
    without=("name", "default_max_tokens", "timeouts", "api_key_env", "max_event_bytes", "max_answer_bytes"),
)
UpstreamTimeoutSettings = _section("UpstreamTimeoutSettings", UpstreamTimeouts)
_UPSTREAM_FIELDS = {field.name for field in dataclasses.fields(Upstream)} - {"timeouts"}


def _checked(check: Callable[..., T], *values: Any, **named: Any) -> T:
    """`check(...)`, with what it refuses as a mistake in the file."""
    try:
        return check(*values, **named)
    except ConfigError as error:
        raise ValueError(error.message) from None


class Replicas(_Section):
    """How many processes serve the model."""

    min: int = Field(default=1, ge=1)
    max: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _fixed(self) -> Replicas:
        if self.min != self.max:
            raise ValueError(f"min ({self.min}) and max ({self.max}) must be equal: autoscaling is not supported yet")
        return self


class Price(_Section):
    """What tokens cost, in one of three ways.

    input, cached_input, output: US dollars per million tokens; cached_input as input where it is not given.
    per_cpu_hour, per_gpu_hour: dollars for each of the replica's CPUs and GPUs, spread over the tokens that a busy
    replica makes in that time: prefill_tokens_per_s, decode_tokens_per_s (all requests together).
    public: a model's name on the public price lists, of `provider` where several have it.
    """

    input: float = Field(default=0.0, ge=0)
    cached_input: float | None = Field(default=None, ge=0)
    output: float = Field(default=0.0, ge=0)
    per_cpu_hour: float | None = Field(default=None, ge=0)
    per_gpu_hour: float | None = Field(default=None, ge=0)
    prefill_tokens_per_s: float | None = Field(default=None, gt=0)
    decode_tokens_per_s: float | None = Field(default=None, gt=0)
    public: str | None = Field(default=None, min_length=1)
    provider: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one_way(self) -> Price:
        given = self.model_fields_set
        ways = [
            name
            for name, fields in (
                ("dollars per million tokens", {"input", "cached_input", "output"}),
                ("hourly rates", _HOURLY | _RATES),
                ("public", {"public", "provider"}),
            )
            if given & fields
        ]
        if len(ways) > 1:
            raise ValueError(f"{' and '.join(ways)} exclude each other")
        if given & (_HOURLY | _RATES) and not (given & _HOURLY and given >= _RATES):
            raise ValueError(
                "hourly rates need prefill_tokens_per_s, decode_tokens_per_s and per_cpu_hour or per_gpu_hour"
            )
        if self.provider and not self.public:
            raise ValueError("provider needs public: the model's name on its list")
        return self

    def dollars(self, *, cpus: float, gpus: float) -> dict[str, float]:
        """As the gateway is told: per million tokens by kind. ConfigError for a model that is on no list."""
        if self.public is not None:
            return prices.per_million(prices.public(self.public, provider=self.provider, at=datetime.now(UTC)))
        if self.prefill_tokens_per_s is None or self.decode_tokens_per_s is None:
            return self.model_dump(include={"input", "cached_input", "output"}, exclude_none=True)
        hourly = prices.from_seconds(
            cpus=cpus,
            cpu_hour_usd=self.per_cpu_hour or 0,
            gpus=gpus,
            gpu_hour_usd=self.per_gpu_hour or 0,
            prefill_rate=self.prefill_tokens_per_s,
            decode_rate=self.decode_tokens_per_s,
        )
        return prices.per_million(hourly)


_HOURLY, _RATES = {"per_cpu_hour", "per_gpu_hour"}, {"prefill_tokens_per_s", "decode_tokens_per_s"}


class ModelGroup(_Section):
    """One model and the replicas that serve it. num_cpus, num_gpus and accelerator_type are Ray's, per replica."""

    name: str = Field(min_length=1, max_length=256)
    aliases: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = ()
    replicas: Replicas = Replicas()
    num_cpus: float = Field(default=1.0, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)
    accelerator_type: str | None = None
    default_max_tokens: int = Field(default=0, ge=0)
    price: Price = Price()
    drain_s: float = Field(default=30.0, ge=0)

    @property
    def dollars(self) -> dict[str, float]:
        """Its price as the gateway is told."""
        return self.price.dollars(cpus=self.num_cpus, gpus=self.num_gpus)

    @property
    def settings(self) -> dict[str, Any]:
        """Engine settings that the file gives."""
        return _given(getattr(self, "engine_settings", None))


class SignalboxGroup(ModelGroup):
    """Our own engine. source: a name from `signalbox models list`, a Hugging Face id, a folder or a GGUF file."""

    engine: Literal["signalbox"] = "signalbox"
    source: str = Field(min_length=1)
    engine_settings: EngineSettings = EngineSettings()


class FakeGroup(ModelGroup):
    """The deterministic engine without weights. tokenizer: a model source whose tokenizer it borrows."""

    engine: Literal["fake"]
    tokenizer: str | None = None
    engine_settings: FakeEngineSettings = FakeEngineSettings()  # type: ignore[valid-type]


class OpenAIGroup(UpstreamSettings, ModelGroup):  # type: ignore[valid-type, misc]
    """Another server that speaks the OpenAI API; it runs elsewhere, so nothing is said of replicas and machines."""

    engine: Literal["openai"]
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    timeouts: UpstreamTimeoutSettings = UpstreamTimeoutSettings()  # type: ignore[valid-type]
    # What other groups may set means nothing here: not a field, so a file that sets it is refused.
    replicas: ClassVar[Replicas] = Replicas.model_construct(min=0, max=0)  # type: ignore[misc]
    num_cpus: ClassVar[float] = 0.0  # type: ignore[misc]
    num_gpus: ClassVar[float] = 0.0  # type: ignore[misc]
    accelerator_type: ClassVar[str | None] = None  # type: ignore[misc]
    drain_s: ClassVar[float] = 0.0  # type: ignore[misc]

    @field_validator("base_url")
    @classmethod
    def _base_url(cls, url: str) -> str:
        return _checked(check_base_url, url) or url

    @field_validator("timeouts")
    @classmethod
    def _timeouts(cls, timeouts: BaseModel) -> BaseModel:
        _checked(UpstreamTimeouts, **_given(timeouts))
        return timeouts

    @model_validator(mode="after")
    def _whole(self) -> OpenAIGroup:
        _checked(self.upstream)
        if self.price.model_fields_set & _HOURLY:
            raise ValueError("price: nothing is known of the hardware behind a server elsewhere")
        return self

    @property
    def dollars(self) -> dict[str, float]:
        """As stated; else, of a public provider's server, as its price list says."""
        if "price" not in self.model_fields_set:
            upstream = self.upstream()
            found = prices.listed(upstream.model, upstream.base_url, at=datetime.now(UTC))
            if found is not None:
                return prices.per_million(found)
        return super().dollars

    def upstream(self) -> Upstream:
        """What the gateway is told of it."""
        given = {name: value for name, value in _given(self).items() if name in _UPSTREAM_FIELDS}
        return Upstream(**given, timeouts=UpstreamTimeouts(**_given(self.timeouts)))


def _engine_of(group: Any) -> str:
    engine = group.get("engine", "signalbox") if isinstance(group, dict) else getattr(group, "engine", "signalbox")
    return str(engine)


AnyGroup = Annotated[
    Annotated[SignalboxGroup, Tag("signalbox")]
    | Annotated[FakeGroup, Tag("fake")]
    | Annotated[OpenAIGroup, Tag("openai")],
    Discriminator(
        _engine_of, custom_error_type="engine", custom_error_message="engine must be 'signalbox', 'fake' or 'openai'"
    ),
]


class Gateway(_Section):
    """The HTTP edge. database: an SQLAlchemy URL; None keeps an SQLite file in the instance's home.

    lease_s: how long a gateway may be silent before another one closes what it has reserved.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    replicas: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=0.5, ge=0)
    database: str | None = None
    limits: GatewayLimits = GatewayLimits()  # type: ignore[valid-type]
    retries: GatewayRetries = GatewayRetries()  # type: ignore[valid-type]
    lease_s: float = Field(default=LEASE_S, ge=1.0, le=3600.0)
    traffic: GatewayTraffic = GatewayTraffic()  # type: ignore[valid-type]

    @field_validator("traffic")
    @classmethod
    def _traffic(cls, traffic: BaseModel) -> BaseModel:
        _checked(Traffic, **_given(traffic))
        return traffic

    @field_validator("retries")
    @classmethod
    def _retries(cls, retries: BaseModel) -> BaseModel:
        _checked(Retries, **_given(retries))
        return retries


class Fleet(_Section):
    """The whole file."""

    models: tuple[AnyGroup, ...]
    gateway: Gateway = Gateway()

    @model_validator(mode="after")
    def _names(self) -> Fleet:
        if not self.models:
            raise ValueError("models must name at least one model")
        seen: set[str] = set()
        for name in (name for model in self.models for name in (model.name, *model.aliases)):
            if name in seen:
                raise ValueError(f"the name {name!r} is used twice among model names and aliases")
            seen.add(name)
        return self

    @property
    def local(self) -> tuple[ModelGroup, ...]:
        """The groups whose replicas this fleet starts itself."""
        return tuple(model for model in self.models if not isinstance(model, OpenAIGroup))

    @property
    def upstreams(self) -> tuple[Upstream, ...]:
        """The servers elsewhere."""
        return tuple(model.upstream() for model in self.models if isinstance(model, OpenAIGroup))

    def gateway_config(self, *, database_url: str, state_dir: str) -> GatewayConfig:
        """What every gateway process is told."""
        gateway = self.gateway
        return GatewayConfig(
            models=tuple(
                ServedModel(
                    name=model.name,
                    aliases=model.aliases,
                    default_max_tokens=model.default_max_tokens,
                    price=model.dollars,
                )
                for model in self.models
            ),
            database_url=gateway.database or database_url,
            state_dir=state_dir,
            limits=Limits(**_given(gateway.limits)),
            retries=Retries(**_given(gateway.retries)),
            traffic=Traffic(**_given(gateway.traffic)),
            upstreams=self.upstreams,
            lease_s=gateway.lease_s,
        )


def schema() -> dict[str, Any]:
    """JSON Schema of the file, for editors."""
    return Fleet.model_json_schema()


def load(path: Path) -> Fleet:
    """Read and check a fleet file. Raises ConfigError that names file, line and key of everything that is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the fleet file {path}: {error}") from error
    return parse(text, str(path))


def parse(text: str, name: str = "fleet") -> Fleet:
    """`load` for text; `name` stands for the file in error messages."""
    source = yaml_text.read(text, name)
    try:
        return Fleet.model_validate(source.data)
    except ValidationError as error:
        raise source.explain_validation(error, Fleet) from None
