"""What people type: times, shares and the error of an option that cannot be read."""

from __future__ import annotations

import math
import re


class LoadError(Exception):
    """A run that cannot begin or go on; the message is for the user and holds no key."""


class BadOption(LoadError, ValueError):
    """An option's value that cannot be read; the message says what would do."""


_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def seconds(text: str) -> float:
    """`500ms`, `1.5s`, `2m`, `1h`; a bare number is seconds. Raises BadOption."""
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]*)\s*", text)
    if found is None or found[2] not in _UNITS:
        raise BadOption(f"{text!r} is not a time: write 500ms, 1.5s, 2m or 1h")
    return float(found[1]) * _UNITS[found[2]]


def share(text: str) -> float:
    """`5%` or `0.05`, between 0 and 1. Raises BadOption."""
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%?)\s*", text)
    number = float(found[1]) / (100 if found[2] else 1) if found else -1.0
    if not 0 <= number <= 1:
        raise BadOption(f"{text!r} is not a share: write 5% or 0.05")
    return number


def show_time(value: float) -> str:
    """Three significant digits in the unit that reads best; "-" for NaN."""
    if math.isnan(value):
        return "-"
    if abs(value) < 0.9995e-3:
        return f"{value * 1e6:.0f} µs"
    if abs(value) < 0.9995:
        return f"{value * 1e3:.3g} ms" if abs(value) < 0.0995 else f"{value * 1e3:.0f} ms"
    return f"{value:.2f} s" if abs(value) < 99.95 else f"{value:.0f} s"
