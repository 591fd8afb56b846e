"""What a gateway is told of one upstream: another server that speaks the OpenAI API. Frozen values, no I/O, no httpx.

The key itself is never part of them, only the name of the environment variable that holds it: a configuration may be
printed, stored and sent to other processes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from replicas.protocol import ConfigError

_VISIBLE = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamTimeouts:
    """Seconds without progress after which an upstream is given up.

    connect_s: TCP and TLS. first_token_s: from sending the request to the first token, keep-alive comments or not.
    gap_s: between two events that carry something. keep_alive_s: how long an idle connection is kept; below what
    servers commonly allow (5 s), so that ours is the side that closes and no request meets a connection just closed.
    """

    connect_s: float = 5.0
    first_token_s: float = 60.0
    gap_s: float = 30.0
    keep_alive_s: float = 4.0

    def __post_init__(self) -> None:
        for name in ("connect_s", "first_token_s", "gap_s", "keep_alive_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be greater than 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """One upstream of one model.

    name: the model as callers know it. base_url: up to and including the version, e.g. "https://api.openai.com/v1".
    api_key_env: the environment variable with the key; None sends none. upstream_model: the server's own name of the
    model; None is `name`. max_model_len 0 leaves the context limit to the upstream, default_max_tokens 0 the length of
    an answer whose caller gave none. max_connections: requests at a time; more are refused at once. tokenizer:
    tiktoken's name of an encoding, or "estimate"; counts for reservations and where the upstream reports no usage.
    max_event_bytes, max_answer_bytes: bounds of one event and of one whole answer on the wire.
    """

    name: str
    base_url: str
    api_key_env: str | None = None
    upstream_model: str | None = None
    max_model_len: int = 0
    default_max_tokens: int = 0
    timeouts: UpstreamTimeouts = field(default_factory=UpstreamTimeouts)
    max_connections: int = 256
    http2: bool = False
    tokenizer: str = "o200k_base"
    max_event_bytes: int = 1024 * 1024
    max_answer_bytes: int = 256 * 1024 * 1024

    def __post_init__(self) -> None:
        check_base_url(self.base_url)
        if self.http2:
            # httpcore 1.0 forgets a stream that is left early without telling the server (no RST_STREAM), so the
            # upstream would go on generating for a caller who is gone.
            raise ConfigError("http2: true is not supported: leaving a stream early would not cancel it upstream")
        for name in ("max_model_len", "default_max_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative")
        for name in ("max_connections", "max_event_bytes", "max_answer_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1")

    @property
    def model(self) -> str:
        """What the upstream calls it."""
        return self.upstream_model or self.name

    @property
    def origin(self) -> str:
        """scheme://host[:port], for our own operators; never shown to callers."""
        parts = urlsplit(self.base_url)
        return f"{parts.scheme}://{parts.netloc}"


def check_base_url(url: str) -> None:
    """ConfigError unless `url` is http(s)://host[:port][/path] and nothing else."""
    try:
        parts = urlsplit(url)
        port_is_fine = parts.port is None or parts.port > 0
    except ValueError:
        raise ConfigError("base_url is not a URL") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_fine or not _VISIBLE.fullmatch(url):
        raise ConfigError("base_url must be http:// or https:// with a host, e.g. 'https://api.example.com/v1'")
    if parts.username or parts.password:
        raise ConfigError("base_url must not hold credentials; name the key's variable in api_key_env")
    if parts.query or parts.fragment:
        raise ConfigError("base_url must not have a query or a fragment")


def read_key(upstream: Upstream, environ: Mapping[str, str] = os.environ) -> str | None:
    """The upstream's key, or None where it needs none. ConfigError, which never shows it, when it cannot be used."""
    if upstream.api_key_env is None:
        return None
    key = environ.get(upstream.api_key_env, "").strip()
    if not key:
        raise ConfigError(f"the environment variable {upstream.api_key_env!r} with the upstream's key is not set")
    if not _VISIBLE.fullmatch(key):  # it would break the header, and the error would then show it
        raise ConfigError(f"the environment variable {upstream.api_key_env!r} holds characters that no key has")
    return key
