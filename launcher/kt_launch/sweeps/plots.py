"""Small plots as inline SVG: points and lines over two axes, and stacked bars. Knows numbers and labels, not benches.

A plot is PLOT_WIDTH wide whatever the page, so that its text is readable on a phone; the page puts several side by
side. Series differ in colour, in the shape of their marks, and in their dashes. Colours are classes s0 to s7, given by
the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

PLOT_WIDTH, PLOT_HEIGHT = 360, 270
LEFT, RIGHT, TOP, BOTTOM = 50, 20, 16, 46
COLOURS = 8
BAR_HEIGHT, BAR_STEP = 16, 46
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Look:
    """How a series is told from others: its colour, and the shape of its marks; all but the first shape are dashed."""

    colour: int
    shape: int


@dataclass(frozen=True)
class Point:
    """A mark: where, a short label beside it, and what it says when pointed at."""

    x: float
    y: float
    label: str = ""
    title: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one colour and shape, joined by a line unless `joined` is false."""

    name: str
    look: Look
    points: Sequence[Point] = field(default_factory=list)
    joined: bool = True
    size: float = 5.0


@dataclass(frozen=True)
class Bar:
    """A bar of parts, one after another: each a name, a length, and the style of its kind."""

    name: str
    parts: Sequence[tuple[str, float, int]]


def nice_ticks(largest: float, count: int = 4) -> list[float]:
    """0 and round steps, the last of them not below `largest`."""
    if largest <= 0:
        return [0.0, 1.0]
    raw = largest / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    return [step * number for number in range(math.ceil(largest / step - 1e-9) + 1)]


def points_plot(series: Sequence[Series], x_label: str, y_label: str, summary: str) -> str:
    """All series over two axes that begin at zero."""
    points = [point for each in series for point in each.points]
    x_ticks = nice_ticks(max((point.x for point in points), default=0.0))
    y_ticks = nice_ticks(max((point.y for point in points), default=0.0))

    def x_of(value: float) -> float:
        return LEFT + value / x_ticks[-1] * (PLOT_WIDTH - LEFT - RIGHT)

    def y_of(value: float) -> float:
        return PLOT_HEIGHT - BOTTOM - value / y_ticks[-1] * (PLOT_HEIGHT - TOP - BOTTOM)

    names = [_with_power(label, ticks) for label, ticks in ((x_label, x_ticks), (y_label, y_ticks))]
    drawn = [_axes(x_ticks, y_ticks, x_of, y_of), _axis_names(*names)]
    drawn += [_series(each, x_of, y_of) for each in series]
    return _svg(PLOT_HEIGHT, summary, drawn)


def bars_plot(bars: Sequence[Bar], unit: str, summary: str) -> str:
    """One bar under another, each with its name above it and its length behind it."""
    height = len(bars) * BAR_STEP + 8
    longest = max((sum(part[1] for part in bar.parts) for bar in bars), default=0.0) or 1.0
    scale = (PLOT_WIDTH - 64) / longest
    drawn = []
    for number, bar in enumerate(bars):
        top, x = number * BAR_STEP + 24, 0.0
        drawn.append(f'<text class="name" x="0" y="{top - 7}">{escape(_shortened(bar.name, 50))}</text>')
        for name, length, style in bar.parts:
            width = length * scale
            title = f"<title>{escape(name)}: {length:.1f} {unit}</title>"
            drawn.append(
                f'<rect class="f{style}" x="{x:.1f}" y="{top}" width="{max(width, 0.4):.1f}" height="{BAR_HEIGHT}">'
                f"{title}</rect>"
            )
            x += width
        total = sum(part[1] for part in bar.parts)
        drawn.append(f'<text class="tick" x="{x + 6:.1f}" y="{top + 12}">{total:.1f} {unit}</text>')
    return _svg(height, summary, drawn)


def mark(look: Look, x: float, y: float, size: float = 5.0, title: str = "") -> str:
    """Circle, square, triangle or diamond."""
    inner = f"<title>{escape(title)}</title>" if title else ""
    shape = look.shape % 4
    name = f'class="m s{look.colour % COLOURS}"'
    if shape == 0:
        return f'<circle {name} cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}">{inner}</circle>'
    corners = {
        1: ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        2: ((0, -1.15), (1.05, 0.8), (-1.05, 0.8)),
        3: ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
    }[shape]
    path = " ".join(f"{x + dx * size:.1f},{y + dy * size:.1f}" for dx, dy in corners)
    return f'<polygon {name} points="{path}">{inner}</polygon>'


def key_mark(look: Look) -> str:
    """A mark of its own, for a legend."""
    return f'<svg class="key" viewBox="0 0 16 16" aria-hidden="true">{mark(look, 8, 8)}</svg>'


def _svg(height: float, summary: str, drawn: Sequence[str]) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {PLOT_WIDTH} {height}" role="img" aria-label="{escape(summary, quote=True)}">'
        f"{''.join(drawn)}</svg>"
    )


def _axes(
    x_ticks: Sequence[float], y_ticks: Sequence[float], x_of: Callable[[float], float], y_of: Callable[[float], float]
) -> str:
    drawn = []
    x_unit, y_unit = 10.0 ** power_of(x_ticks[-1]), 10.0 ** power_of(y_ticks[-1])
    for value in y_ticks:
        y = y_of(value)
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{PLOT_WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text class="tick end" x="{LEFT - 7}" y="{y + 4:.1f}">{value / y_unit:.4g}</text>')
    for value in x_ticks:
        place = f'x="{x_of(value):.1f}" y="{PLOT_HEIGHT - BOTTOM + 18}"'
        drawn.append(f'<text class="tick middle" {place}>{value / x_unit:.4g}</text>')
    floor = PLOT_HEIGHT - BOTTOM
    drawn.append(f'<line class="axis" x1="{LEFT}" x2="{PLOT_WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    return "".join(drawn)


def _axis_names(x_label: str, y_label: str) -> str:
    middle_x, middle_y = (LEFT + PLOT_WIDTH - RIGHT) / 2, (TOP + PLOT_HEIGHT - BOTTOM) / 2
    return (
        f'<text class="name middle" x="{middle_x:.0f}" y="{PLOT_HEIGHT - 6}">{escape(x_label)}</text>'
        f'<text class="name middle" transform="translate(12 {middle_y:.0f}) rotate(-90)">{escape(y_label)}</text>'
    )


def _series(series: Series, x_of: Callable[[float], float], y_of: Callable[[float], float]) -> str:
    places = [(x_of(point.x), y_of(point.y), point) for point in series.points]
    drawn = []
    if series.joined and len(places) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
        dash = ' stroke-dasharray="5 4"' if series.look.shape else ""
        drawn.append(f'<polyline class="line s{series.look.colour % COLOURS}" points="{path}"{dash}/>')
    for x, y, point in places:
        drawn.append(mark(series.look, x, y, series.size, point.title))
        if point.label:
            drawn.append(f'<text class="tick halo middle" x="{x:.1f}" y="{y - 9:.1f}">{escape(point.label)}</text>')
    return "".join(drawn)


def power_of(largest: float) -> int:
    """The power of ten, a multiple of three, that numbers along an axis are divided by to be short."""
    if 0.01 <= largest < 10000:
        return 0
    return math.floor(math.log10(largest) / 3) * 3


def _with_power(label: str, ticks: Sequence[float]) -> str:
    power = power_of(ticks[-1])
    return f"{label} × 10{str(power).translate(RAISED)}" if power else label


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
