"""The report as one HTML page that needs nothing else: no script, no font, no file beside it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from kt_launch.sweeps.folder import OK, Row
from kt_launch.sweeps.plots import Bar, Look, Point, Series, bars_plot, key_mark, points_plot
from kt_launch.sweeps.style import STYLE
from kt_launch.sweeps.tables import GIB, HEADINGS, NOTE, lines, loads, quality, result, settings, show_kl, targets

NO_BREAK = "\u2011"
"""A hyphen at which no line is broken."""


def to_html(rows: Sequence[Row]) -> str:
    """The whole page."""
    title = f"Bench of {model_name(rows)}"
    body = [
        f"<header><h1>{escape(title)}</h1>{_facts(rows)}</header>",
        _failures(rows),
        f"<section><h2>Results</h2>{_table(rows)}<p class='note'>{escape(NOTE)}</p></section>",
    ]
    if any(row.get("loads") for row in rows):
        body.append(_plots(rows))
    body.append(_runs(rows))
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n{chr(10).join(body)}\n"
        "</main></body>\n</html>\n"
    )


def model_name(rows: Sequence[Row]) -> str:
    """The model, or the models."""
    names = dict.fromkeys(str(name) for row in rows if (name := (row.get("resolved") or {}).get("model.name")))
    return ", ".join(names) or "no model"


def _facts(rows: Sequence[Row]) -> str:
    machine: dict[str, Any] = next((row["machine"] for row in rows if row.get("machine")), {})
    ended_well = sum(row["state"] == OK for row in rows)
    facts = [
        str(rows[0].get("began", ""))[:16].replace("T", " ") if rows else "",
        str(machine.get("cpu", "")),
        f"{machine['cores']} cores" if machine.get("cores") else "",
        f"{machine['memory_bytes'] / GIB:.0f} GiB" if machine.get("memory_bytes") else "",
        f"{ended_well} of {len(rows)} jobs ended well",
    ]
    return f"<p class='facts'>{''.join(f'<span>{escape(fact)}</span>' for fact in facts if fact)}</p>"


def _failures(rows: Sequence[Row]) -> str:
    failed = [row for row in rows if row["state"] != OK]
    items = [f"<li><b>{escape(settings(row, rows))}</b><br>{escape(result(row))}</li>" for row in failed]
    return f"<section class='failed'><h2>Not measured</h2><ul>{''.join(items)}</ul></section>" if items else ""


def _table(rows: Sequence[Row]) -> str:
    head = "".join(f"<th scope='col'>{escape(heading).replace('-', NO_BREAK)}</th>" for heading in HEADINGS)
    body = []
    for line in lines(rows):
        shown = (*line.cells[1:-1], line.row["state"])
        cells = [
            f"<td data-name='{escape(heading)}'>{escape(cell)}</td>"
            for heading, cell in zip(HEADINGS[1:], shown, strict=True)
        ]
        state = "" if line.row["state"] == OK else " class='bad'"
        body.append(f"<tr{state}><th scope='row'>{escape(line.cells[0])}</th>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _sides(rows: Sequence[Row]) -> Iterator[tuple[Look, str, Row, str]]:
    """Every target of every row that was measured: its look (a colour a row), its name, and what it is."""
    measured = [row for row in rows if row.get("loads")]
    for colour, row in enumerate(measured):
        for shape, target in enumerate(targets(row)):
            name = f"{settings(row, rows)}, {target}" if len(measured) > 1 else target
            yield Look(colour, shape), name, row, target


def _plots(rows: Sequence[Row]) -> str:
    legend = "".join(f"<li>{key_mark(look)}{escape(name)}</li>" for look, name, _, _ in _sides(rows))
    figures = [
        _figure("Next token against throughput", _load_plot(rows, "tpot_ms", "ms for each next token")),
        _figure("First token against throughput", _load_plot(rows, "ttft_ms", "ms to the first token")),
        _figure("Quality against memory", _quality_plot(rows)),
        _figure("Start", _start_plot(rows), _start_legend(rows)),
    ]
    return (
        f"<section><h2>Plots</h2><ul class='legend'>{legend}</ul><div class='grid'>{''.join(figures)}</div>"
        "<p class='note'>Numbers at points are requests at the same time. Lower and further right is better; for "
        "quality, lower and further left.</p></section>"
    )


def _figure(title: str, plot: str, legend: str = "") -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{plot}{legend}</figure>"


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
        series.append(Series(name, look, points))
    return points_plot(series, "output tokens/s", y_label, f"{y_label} against output tokens per second")


def _quality_plot(rows: Sequence[Row]) -> str:
    series = []
    for look, name, row, target in _sides(rows):
        found, peak = quality(row, target), (row.get("memory") or {}).get("peak_rss_bytes")
        if found and peak:
            kl = float(found["kl"]["mean"])
            title = f"{name}: {peak / GIB:.2f} GiB, KL {show_kl(kl)}, same top-1 {found['top1_agreement']:.1%}"
            size = 4.5 if look.shape else 7.5
            series.append(Series(name, look, [Point(peak / GIB, kl, "", title)], joined=False, size=size))
    if not series:
        return "<p class='none'>Quality was not measured.</p>"
    return points_plot(series, "peak memory, GiB", "mean KL to BF16, nats", "KL to BF16 against peak memory")


def _phases(row: Row) -> list[tuple[str, float]]:
    """The phases of a start with their lengths."""
    begins = (row.get("start") or {}).get("phases") or {}
    names = sorted(begins, key=lambda name: float(begins[name]))
    return [(name, float(begins[after]) - float(begins[name])) for name, after in itertools.pairwise(names)]


def _phase_styles(rows: Sequence[Row]) -> dict[str, int]:
    names = dict.fromkeys(name for row in rows for name, _ in _phases(row))
    return {name: style for style, name in enumerate(names)}


def _start_plot(rows: Sequence[Row]) -> str:
    styles = _phase_styles(rows)
    bars = [
        Bar(settings(row, rows), [(name, length, styles[name] % 8) for name, length in _phases(row)])
        for row in rows
        if _phases(row)
    ]
    return bars_plot(bars, "s", "Seconds until the server is ready, by phase") if bars else "<p class='none'>-</p>"


def _start_legend(rows: Sequence[Row]) -> str:
    items = [f"<li><i class='f{style % 8}'></i>{escape(name)}</li>" for name, style in _phase_styles(rows).items()]
    return f"<ul class='legend small'>{''.join(items)}</ul>"


def _runs(rows: Sequence[Row]) -> str:
    items = []
    for row in rows:
        command = " ".join(row["overrides"]) or "(as shipped)"
        folder = f"<code>{escape(row['run_folder'])}</code>" if row.get("run_folder") else "no run folder"
        items.append(f"<li><code>{escape(command)}</code><br>{folder}</li>")
    return f"<section><details><summary>Commands and run folders</summary><ol>{''.join(items)}</ol></details></section>"
