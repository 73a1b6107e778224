"""The report as one HTML page: the data for page.html.jinja, and the style of each plot."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kt_launch.sweeps.folder import OK, Row
from kt_launch.sweeps.plots import Bar, Look, Point, Series, bars_plot, key_mark, points_plot
from kt_launch.sweeps.tables import (
    HEADINGS,
    NOTE,
    expert_bytes,
    lines,
    loads,
    quality,
    result,
    settings,
    shared_settings,
    show_kl,
    targets,
    verdict,
)
from kt_model.printable import KEPT, printable
from kt_model.units import GIB

WITHIN_START = ("import SGLang", "processes", "model code")
"""Phases that the plot merges into the first one, because there are more of them than colours."""


class Side(NamedTuple):
    """One measured target of one row: a colour per row, a shape per target."""

    look: Look
    name: str
    row: Row
    target: str

    @property
    def key(self) -> str:
        return key_mark(self.look)


def _printable(value: Any) -> Any:
    """Escapes text of unknown origin for the page; a drawing is our own and stays as it is."""
    return printable(value, KEPT) if type(value) is str else value


def to_html(rows: Sequence[Row]) -> str:
    """The whole page."""
    import jinja2

    template = Path(__file__).with_name("page.html.jinja").read_text()
    return (
        jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined, finalize=_printable)
        .from_string(template)
        .render(
            style=Path(__file__).with_name("page.css").read_text(),
            model=model_name(rows),
            facts=_facts(rows),
            verdict=verdict(rows),
            failed=[row for row in rows if row["state"] != OK],
            rows=rows,
            settings=settings,
            result=result,
            headings=HEADINGS,
            lines=lines(rows),
            note=NOTE,
            sides=list(_sides(rows)),
            figures=_figures(rows) if any(row.get("loads") for row in rows) else {},
            phases=_phase_colours(rows),
        )
    )


def model_name(rows: Sequence[Row]) -> str:
    """The model, or the models."""
    names = dict.fromkeys(str(name) for row in rows if (name := (row.get("resolved") or {}).get("model.name")))
    return ", ".join(names) or "no model"


def _facts(rows: Sequence[Row]) -> list[list[str]]:
    """Where and when; on which machine; with which settings. One line each."""
    machine, versions = (_first(rows, key) for key in ("machine", "versions"))
    where = [
        str(rows[0].get("began", ""))[:16].replace("T", " ") if rows else "",
        ", ".join(dict.fromkeys(str(row["host"]) for row in rows if row.get("host"))),
        str(machine.get("cpu", "")),
        f"{machine['cores']} cores" if machine.get("cores") else "",
        f"{machine['memory_bytes'] / GIB:.0f} GiB" if machine.get("memory_bytes") else "",
        f"{sum(row['state'] == OK for row in rows)} of {len(rows)} jobs succeeded",
    ]
    measured = [f"bench.{name}={_shown(value)}" for name, value in _first(rows, "bench").items()]
    found = [where, [f"{name} {number}" for name, number in versions.items()], [*shared_settings(rows), *measured]]
    return [[fact for fact in line if fact] for line in found]


def _first(rows: Sequence[Row], key: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next((row[key] for row in rows if row.get(key)), {})
    return found


def _shown(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _sides(rows: Sequence[Row]) -> Iterator[Side]:
    measured = [row for row in rows if row.get("loads")]
    for colour, row in enumerate(measured):
        for shape, target in enumerate(targets(row)):
            name = f"{settings(row, rows)}, {target}" if len(measured) > 1 else target
            yield Side(Look(colour, shape), name, row, target)


def _figures(rows: Sequence[Row]) -> dict[str, str]:
    """Title -> plot; empty if nothing was measured."""
    return {
        "Next token against throughput": _load_plot(rows, "tpot_ms", "ms for each next token"),
        "First token against throughput": _load_plot(rows, "ttft_ms", "ms to the first token"),
        "Quality against memory of the experts": _quality_plot(rows),
        "Start": _start_plot(rows),
    }


def _load_plot(rows: Sequence[Row], time: str, y_label: str) -> str:
    series = []
    for look, name, row, target in _sides(rows):
        points = [
            Point(
                load["output_tokens_per_s"],
                load[time]["median"],
                str(load["concurrency"]),
                f"{name}, {load['concurrency']} at once: {load['output_tokens_per_s']:.1f} tokens/s, "
                f"{load[time]['median']:.1f} ms",
            )
            for load in loads(row, target)
            if load[time]
        ]
        series.append(Series(look, points))
    return points_plot(series, "output tokens/s", y_label, f"{y_label} against output tokens per second")


def _quality_plot(rows: Sequence[Row]) -> str:
    series = []
    for look, name, row, target in _sides(rows):
        found, size = quality(row, target), expert_bytes(row)
        if found and size:
            kl = float(found["kl"]["mean"])
            title = f"{name}: {size / GIB:.3g} GiB, KL {show_kl(kl)}, same top-1 {found['top1_agreement']:.1%}"
            series.append(Series(look, [Point(size / GIB, kl, "", title)], size=4.5 if look.shape else 7.5))
    if not series:
        return ""
    return points_plot(
        series, "memory of the experts, GiB", "mean KL to BF16, nats", "KL to BF16 against expert memory"
    )


def _phases(row: Row) -> list[tuple[str, float]]:
    """The phases of a start with their lengths."""
    begins = (row.get("start") or {}).get("phases") or {}
    names = sorted((name for name in begins if name not in WITHIN_START), key=lambda name: float(begins[name]))
    return [(name, float(begins[after]) - float(begins[name])) for name, after in itertools.pairwise(names)]


def _phase_colours(rows: Sequence[Row]) -> dict[str, int]:
    names = dict.fromkeys(name for row in rows for name, _ in _phases(row))
    return {name: colour for colour, name in enumerate(names)}


def _start_plot(rows: Sequence[Row]) -> str:
    colours = _phase_colours(rows)
    bars = [
        Bar(settings(row, rows), [(name, length, colours[name]) for name, length in _phases(row)])
        for row in rows
        if _phases(row)
    ]
    return bars_plot(bars, "s", "Seconds until the server is ready, by phase") if bars else ""
