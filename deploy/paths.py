"""Where Signalbox keeps things on this machine. Nothing is created here: whoever writes makes the folder."""

from __future__ import annotations

import os
from pathlib import Path


def state_dir() -> Path:
    """Databases, keys and records of running instances: $SIGNALBOX_HOME, or a folder below $XDG_STATE_HOME."""
    if home := os.environ.get("SIGNALBOX_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "signalbox"


def database_url(of_fleet: str | None = None) -> str:
    """A new instance's database: what its fleet file says, else $DATABASE_URL, else an SQLite file in its home."""
    return of_fleet or os.environ.get("DATABASE_URL") or f"sqlite:///{state_dir() / 'signalbox.db'}"


def cache_dir() -> Path:
    """What can be fetched again: $SIGNALBOX_CACHE, or a folder below $XDG_CACHE_HOME."""
    if cache := os.environ.get("SIGNALBOX_CACHE"):
        return Path(cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "signalbox"


def models_dir() -> Path:
    """One folder per pulled model, whole or absent."""
    return cache_dir() / "models"
