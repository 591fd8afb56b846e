"""Line charts as SVG text: no library, no network, no script. Colours follow the page's light or dark scheme."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 30, 42
COLOURS = ("#2f6fde", "#d9534f", "#2e9e6b", "#b07d12", "#8250c4", "#1795a5", "#c2528b", "#6b7280")

Point = tuple[float, float | None]


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    points: Sequence[Point]  # a None breaks the line


@dataclass(frozen=True, slots=True)
class Axis:
    title: str
    show: Callable[[float], str]
    log: bool = False


def chart(title: str, x: Axis, y: Axis, lines: Sequence[Line], *, marks: bool = False) -> str:
    """An <svg> with axes, grid and legend; "" if there is nothing to draw. Log axes leave out what is not positive."""
    shown = [Line(line.name, [p for p in line.points if _drawable(p, x, y)]) for line in lines]
    values = [(a, b) for line in shown for a, b in line.points if b is not None]
    if not values:
        return ""
    across = _Scale([a for a, _ in values], x.log, _LEFT, WIDTH - _RIGHT)
    up = _Scale([b for _, b in values], y.log, HEIGHT - _BOTTOM, _TOP, from_zero=not y.log)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text class="title" x="{_LEFT}" y="15">{escape(title)}</text>',
    ]
    parts += _axes(x, y, across, up)
    for number, line in enumerate(shown):
        parts += _draw(line, COLOURS[number % len(COLOURS)], across, up, marks)
    return "".join([*parts, "</svg>", _legend(shown)])


def _drawable(point: Point, x: Axis, y: Axis) -> bool:
    a, b = point
    return not ((x.log and a <= 0) or (y.log and b is not None and b <= 0))


class _Scale:
    """Values to pixels."""

    def __init__(
        self, values: Sequence[float], log: bool, begin: float, end: float, *, from_zero: bool = False
    ) -> None:
        self.log, self._begin, self._end = log, begin, end
        low, high = min(values), max(values)
        if log:
            low, high = math.log10(low), math.log10(high)
            low, high = (low - 0.05, high + 0.05) if high - low < 0.1 else (low, high)
        else:
            low = min(low, 0.0) if from_zero else low
            high = high if high > low else low + 1
        self.low, self.high = low, high

    def at(self, value: float) -> float:
        share = ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)
        return round(self._begin + share * (self._end - self._begin), 1)

    def ticks(self) -> list[float]:
        if self.log:
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            every = (1, 2, 5) if self.high - self.low < 2 else (1,)
            found = [digit * 10.0**decade for decade in decades for digit in every]
            found = [one for one in found if self.low <= math.log10(one) <= self.high]
            return found if len(found) > 1 else [10**self.low, 10**self.high]
        raw = (self.high - self.low) / 5
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _axes(x: Axis, y: Axis, across: _Scale, up: _Scale) -> list[str]:
    bottom = HEIGHT - _BOTTOM
    parts = []
    for tick in across.ticks():
        at = across.at(tick)
        parts.append(f'<line class="grid" x1="{at}" y1="{_TOP}" x2="{at}" y2="{bottom}"/>')
        parts.append(f'<text x="{at}" y="{bottom + 14}" text-anchor="middle">{escape(x.show(tick))}</text>')
    for tick in up.ticks():
        at = up.at(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{at}" x2="{WIDTH - _RIGHT}" y2="{at}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 3}" text-anchor="end">{escape(y.show(tick))}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.title)}</text>')
    return parts


def _draw(line: Line, colour: str, across: _Scale, up: _Scale, marks: bool) -> list[str]:
    pieces: list[list[str]] = [[]]
    dots = []
    for a, b in line.points:
        if b is None:
            pieces.append([])
            continue
        pieces[-1].append(f"{across.at(a)},{up.at(b)}")
        if marks:
            dots.append(f'<circle cx="{across.at(a)}" cy="{up.at(b)}" r="3" fill="{colour}"/>')
    drawn = [
        f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{" ".join(piece)}"/>'
        for piece in pieces
        if piece
    ]
    return drawn + dots


def _legend(lines: Sequence[Line]) -> str:
    items = (
        f'<span><i style="background:{COLOURS[number % len(COLOURS)]}"></i>{escape(line.name)}</span>'
        for number, line in enumerate(lines)
    )
    return f'<div class="legend">{"".join(items)}</div>'
