"""Where prices come from: the fleet file, the seconds of the hardware, or the public price lists of `genai-prices`.

All give a `Price` in whole pico-dollars per token, so that the most a request can cost is known before it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any

from policies.budget import PICO, Number, Price, pico_usd
from replicas.protocol import ConfigError


def from_fleet(price: Mapping[str, float]) -> Price:
    """Dollars per million tokens by kind ("input", "cached_input", "output"), and dollars per "request".

    Where cached_input is not given, cached tokens cost what others do.
    """
    unknown = price.keys() - {"input", "cached_input", "output", "request"}
    if unknown:
        raise ConfigError(f"unknown kinds of price: {', '.join(sorted(unknown))}")
    return Price.per_million(
        input=price.get("input", 0),
        cached_input=price.get("cached_input"),
        output=price.get("output", 0),
        request=price.get("request", 0),
    )


def per_million(price: Price) -> dict[str, float]:
    """The other way round, exactly."""
    million = {kind: getattr(price, kind) * 10**6 / PICO for kind in ("input", "cached_input", "output")}
    return {**million, "request": price.request / PICO}


def from_seconds(
    *,
    cpus: Number = 0,
    cpu_hour_usd: Number = 0,
    gpus: Number = 0,
    gpu_hour_usd: Number = 0,
    prefill_rate: Number,
    decode_rate: Number,
) -> Price:
    """A replica's CPU and GPU seconds x their rates, spread over the tokens it makes in them. Rounded up.

    prefill_rate, decode_rate: tokens a second of a busy replica, all requests together, as the fleet's owner states
    them. They are stated and not read off the engine, because a price must not depend on who else is asking, and a
    reservation needs it beforehand. A cached token costs no seconds.
    """
    dollars = Decimal(str(cpus)) * Decimal(str(cpu_hour_usd)) + Decimal(str(gpus)) * Decimal(str(gpu_hour_usd))
    rates = [Decimal(str(rate)) for rate in (prefill_rate, decode_rate)]
    if dollars < 0 or min(rates) <= 0:
        raise ConfigError("hourly rates must not be negative, tokens a second must be greater than 0")
    a_second = dollars / 3600
    return Price(input=pico_usd(a_second / rates[0]), cached_input=0, output=pico_usd(a_second / rates[1]))


def listed(model: str, api_url: str, *, at: datetime) -> Price | None:
    """The list price at the server of that URL; None where it is none of the public ones or does not list the model."""
    from genai_prices.data_snapshot import get_snapshot

    try:
        provider, _ = get_snapshot().find_provider_model(model, None, None, api_url)
    except LookupError:
        return None
    return public(model, provider=provider.id, at=at)


def public(model: str, *, provider: str | None = None, at: datetime, prompt_tokens: int = 0) -> Price:
    """The list price of a public model at a time, from the data that `genai-prices` carries (no network).

    Some prices rise for the whole request when its prompt is long, hence `prompt_tokens`. Prices of other things than
    tokens and requests (searches, images) are not for us. Raises ConfigError for a model that is not on the list.
    """
    from genai_prices.data_snapshot import get_snapshot

    try:
        _, info = get_snapshot().find_provider_model(model, None, provider, None)
    except LookupError:
        where = f" of {provider!r}" if provider else ""
        raise ConfigError(
            f"no public price is known for the model {model!r}{where}; give one in the fleet file"
        ) from None
    prices = info.get_prices(at)
    per_million = {kind: _rate(getattr(prices, name, None), prompt_tokens) for kind, name in _KINDS.items()}
    per_thousand = _rate(getattr(prices, "requests_kcount", None), prompt_tokens) or Decimal(0)
    return Price.per_million(
        input=per_million["input"] or 0,
        cached_input=per_million["cached_input"],
        output=per_million["output"] or 0,
        request=per_thousand / 1000,
    )


_KINDS = {"input": "input_mtok", "cached_input": "cache_read_mtok", "output": "output_mtok"}


def _rate(price: Any, prompt_tokens: int) -> Decimal | None:
    """A plain or a tiered price; a tier holds from more than `start` prompt tokens on, for all of them."""
    if price is None or isinstance(price, Decimal):
        return price
    rate: Decimal = price.base
    for tier in price.tiers:
        if prompt_tokens > tier.start:
            rate = tier.price
    return rate
