"""Small plots as inline SVG, drawn by matplotlib: points and lines over two axes, and stacked bars. Knows numbers and
labels, nothing about benches.

A plot is as wide as a phone, whatever the page; the page puts several side by side. Series differ in colour, marker
shape and dashes. Colours and fonts are the page's: each colour is drawn as a placeholder that becomes a CSS variable,
so that one plot works in light and dark mode.
"""

from __future__ import annotations

import io
import itertools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import BboxBase

WIDTH, HEIGHT, BAR_STEP = 360, 270, 46
"""In points, which are the user units of matplotlib's SVG."""
COLOURS = 8
INK, SOFT, LINE, CARD = "#fe0001", "#fe0002", "#fe0003", "#fe0004"
VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line", CARD: "card"} | {
    f"#fd000{number}": f"s{number}" for number in range(COLOURS)
}
MARKS = "os^D"
LABEL_PLACES = (
    (0, 6, "center", "bottom"),
    (0, -6, "center", "top"),
    (7, 0, "left", "center"),
    (-7, 0, "right", "center"),
)
"""Label positions around a point, in points; the first free one is used."""
MARK_REACH = 4.0
"""The distance of a label from the centre of every mark, in points."""
LONGEST_NAME = 50


@dataclass(frozen=True)
class Look:
    """How a series is distinguished: its colour, and the shape of its marks; all but the first shape are dashed."""

    colour: int
    shape: int


@dataclass(frozen=True)
class Point:
    """A mark: its position, a short label beside it, and its tooltip."""

    x: float
    y: float
    label: str = ""
    title: str = ""


@dataclass(frozen=True)
class Series:
    """Points with one look, joined by a line."""

    look: Look
    points: Sequence[Point]
    size: float = 5.0


@dataclass(frozen=True)
class Bar:
    """A stacked bar: each part has a name, a length, and a colour number."""

    name: str
    parts: Sequence[tuple[str, float, int]]


def points_plot(series: Sequence[Series], x_label: str, y_label: str, summary: str) -> str:
    """All series over two axes that begin at zero. A label that would overlap another one or a mark is left out."""
    figure, axes = _new_figure(HEIGHT)
    titles: list[str] = []
    for each in series:
        colour, dash = _colour(each.look.colour), (0, (2.5, 2)) if each.look.shape else "-"
        axes.plot([p.x for p in each.points], [p.y for p in each.points], color=colour, linestyle=dash, linewidth=2)
        for point in each.points:
            _draw_mark(axes, point.x, point.y, each.look, each.size, gid=f"title-{len(titles)}")
            titles.append(point.title)
    axes.set_xlabel(x_label, color=INK, fontsize=12)
    axes.set_ylabel(y_label, color=INK, fontsize=12)
    axes.set_xlim(left=0, right=_bound(point.x for each in series for point in each.points))
    axes.set_ylim(bottom=0, top=_bound(point.y for each in series for point in each.points))
    axes.locator_params(nbins=5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:.6g}")
    axes.grid(axis="y", color=LINE)
    axes.tick_params(length=0, pad=6, colors=SOFT, labelsize=11.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(SOFT)
    _label_points(figure, axes, [point for each in series for point in each.points])
    return _svg(figure, summary, titles)


def bars_plot(bars: Sequence[Bar], unit: str, summary: str) -> str:
    """One bar below another, each with its name above it and its length after it."""
    figure, axes = _new_figure(len(bars) * BAR_STEP + 8)
    axes.set_axis_off()
    titles: list[str] = []
    longest = max((sum(length for _, length, _ in bar.parts) for bar in bars), default=0.0) or 1.0
    axes.set_xlim(0, longest * WIDTH / (WIDTH - 64))
    axes.set_ylim(len(bars), 0)
    for row, bar in enumerate(bars):
        ends = [0.0, *itertools.accumulate(length for _, length, _ in bar.parts)]
        for (name, length, colour), begin in zip(bar.parts, ends, strict=False):
            axes.barh(row + 0.72, length, 0.36, begin, color=_colour(colour), gid=f"title-{len(titles)}")
            titles.append(f"{name}: {length:.1f} {unit}")
        axes.text(0, row + 0.42, _shortened(bar.name), color=INK, fontsize=12)
        total, end = f"{ends[-1]:.1f} {unit}", (ends[-1], row + 0.72)
        axes.annotate(total, end, (6, 0), textcoords="offset points", color=SOFT, fontsize=11.5, va="center")
    return _svg(figure, summary, titles)


def key_mark(look: Look) -> str:
    """A single mark, for a legend."""
    figure, axes = _new_figure(16, 16, None)
    axes.set_axis_off()
    _draw_mark(axes, 0, 0, look, 5.0)
    return _svg(figure, "")


def _new_figure(
    height: float, width: float = WIDTH, layout: Literal["constrained"] | None = "constrained"
) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it logs about its font cache
    figure = Figure(figsize=(width / 72, height / 72), layout=layout)
    figure.patch.set_visible(False)
    axes = figure.subplots()
    axes.patch.set_visible(False)
    return figure, axes


def _draw_mark(axes: Axes, x: float, y: float, look: Look, size: float, gid: str | None = None) -> None:
    style: dict[str, Any] = {"markersize": 2 * size, "markeredgecolor": CARD, "markeredgewidth": 1.2, "clip_on": False}
    shape = MARKS[look.shape % len(MARKS)]
    axes.plot([x], [y], marker=shape, color=_colour(look.colour), gid=gid, zorder=3, **style)


def _label_points(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    centres = axes.transData.transform([(point.x, point.y) for point in points] or [(0, 0)])
    reach = MARK_REACH * figure.dpi / 72
    taken: list[BboxBase] = [Bbox.from_bounds(x - reach, y - reach, 2 * reach, 2 * reach) for x, y in centres]
    for point in (point for point in points if point.label):
        for right, up, horizontal, vertical in LABEL_PLACES:
            text = axes.annotate(
                point.label,
                (point.x, point.y),
                xytext=(right, up),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                color=SOFT,
                fontsize=10.5,
            )
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def _bound(values: Any) -> float:
    return 1.08 * max(values, default=0.0) or 1.0


def _colour(number: int) -> str:
    return f"#fd000{number % COLOURS}"


def _svg(figure: Figure, summary: str, titles: Sequence[str] = ()) -> str:
    """The figure as part of the page: with the page's colours and font, and no ids that other plots use too."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": summary}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    said = f'class="plot" role="img" aria-label="{escape(summary)}"' if summary else 'aria-hidden="true"'
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None
    body = re.sub(r"(?s)^.*?<svg[^>]*>", f"<svg {said} {view.group()}>", text)
    body = re.sub(r"(?s)<metadata>.*?</metadata>|<style.*?</style>", "", body)
    body = re.sub(r"font-family: [^;\"]*; ", "", re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body))
    for placeholder, variable in VARIABLES.items():
        body = body.replace(placeholder, f"var(--{variable})")
    body = re.sub(r'<g id="title-(\d+)">', lambda found: f"<g><title>{escape(titles[int(found[1])])}</title>", body)
    return re.sub(r'<g id="[^"]*"', "<g", body)


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 1]}…"
