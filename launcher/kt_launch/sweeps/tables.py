"""The results of a sweep's rows as table lines: one for each target of each row. Draws nothing itself."""

from __future__ import annotations

import csv
import html
import io
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kt_launch.bench.client import median_ms
from kt_launch.sweeps.folder import FORMAT, OK, Row
from kt_model.printable import printable
from kt_model.units import GIB

BASE = "base"
NOTHING = "-"
HEADINGS = (
    "settings",
    "target",
    "first token, ms",
    "next token, ms",
    "tokens/s",
    "experts, GiB",
    "peak, GiB",
    "start, s",
    "KL to BF16",
    "same top-1",
    "result",
)
NOTE = (
    "First and next token: medians at the lowest concurrency. Tokens/s: the best load, with its concurrency."
    " Experts: memory of the routed experts as the kernels hold them; peak: resident "
    "memory of all server processes. KL and top-1: against a BF16 server, each token of a shipped text."
    " A dash: not measured, or numbers that cannot be, also when measured again."
)
LOAD_COLUMNS = (
    "target",
    "concurrency",
    "requests",
    "completed",
    "duration_s",
    "requests_per_s",
    "output_tokens_per_s",
    "total_tokens_per_s",
)
TIME_COLUMNS = ("ttft_ms", "tpot_ms", "itl_ms", "latency_ms")


@dataclass(frozen=True)
class Line:
    """One target of one row; the cells correspond to HEADINGS."""

    row: Row
    target: str
    cells: tuple[str, ...]


def settings(row: Row, rows: Sequence[Row]) -> str:
    """The overrides in which this row differs from others; all of them if it is alone."""
    shared = _shared(rows)
    own = [override for override in row["overrides"] if len(rows) == 1 or override not in shared]
    return shlex.join(own) or "(as shipped)"


def shared_settings(rows: Sequence[Row]) -> list[str]:
    """The overrides that all rows share."""
    return [override for override in rows[0]["overrides"] if override in _shared(rows)] if len(rows) > 1 else []


def _shared(rows: Sequence[Row]) -> set[str]:
    return set.intersection(*(set(each["overrides"]) for each in rows))


def verdict(rows: Sequence[Row]) -> list[str]:
    """Two sentences about the measured rows: which is fastest and smallest, and which is closest to BF16."""
    measured = [row for row in rows if row["state"] == OK and row.get("loads")]
    if len(measured) < 2:
        return []
    fastest = max(measured, key=_best_speed)
    said = f"{settings(fastest, rows)} is the fastest with {_best_speed(fastest):.1f} tokens/s"
    sized = [row for row in measured if expert_bytes(row)]
    if len({expert_bytes(row) for row in sized}) > 1:
        smallest = min(sized, key=expert_bytes)
        whose = "and" if smallest is fastest else settings(smallest, rows)
        said += f", {whose} the smallest with {expert_bytes(smallest) / GIB:.3g} GiB of experts"
    compared = sorted((row for row in measured if row.get("quality")), key=_worst_kl)
    if not compared:
        return [f"{said}.", "How close they are to BF16 was not measured."]
    close = [f"{settings(row, rows)} (KL {show_kl(_worst_kl(row))})" for row in compared[:2]]
    return [f"{said}.", f"{close[0]} is the closest to BF16{f', then {close[1]}' if close[1:] else ''}."]


def _best_speed(row: Row) -> float:
    return max(float(load["output_tokens_per_s"]) for load in row["loads"])


def _worst_kl(row: Row) -> float:
    return max(float(found["kl"]["mean"]) for found in row["quality"])


def expert_bytes(row: Row) -> int:
    """Memory of the routed experts in the kernels; 0 if unknown."""
    return int(row.get("expert_bytes") or 0)


def lines(rows: Sequence[Row]) -> list[Line]:
    """All lines of the table."""
    return [Line(row, target, _cells(row, rows, target)) for row in rows for target in targets(row)]


def targets(row: Row) -> list[str]:
    """The measured targets: the base, then the adapters."""
    found = [load["target"] for load in row.get("loads") or []]
    return list(dict.fromkeys(found)) or [NOTHING]


def loads(row: Row, target: str) -> list[dict[str, Any]]:
    """The loads of one target, by concurrency."""
    found = [load for load in row.get("loads") or [] if load["target"] == target]
    return sorted(found, key=lambda load: int(load["concurrency"]))


def quality(row: Row, target: str) -> dict[str, Any] | None:
    """The comparison of one target with BF16."""
    return next((found for found in row.get("quality") or [] if found["target"] == target), None)


def result(row: Row) -> str:
    """ok, or how it ended and why."""
    if row["state"] == OK:
        return OK
    return f"{row['state']}: {row['error']}" if row.get("error") else f"{row['state']}: exit {row['exit_code']}"


def show_kl(value: float) -> str:
    """Zero is printed as zero: it was measured."""
    return "0" if value == 0 else f"{value:.2g}"


def _cells(row: Row, rows: Sequence[Row], target: str) -> tuple[str, ...]:
    measured, found = loads(row, target), quality(row, target)
    best = max(measured, key=lambda load: float(load["output_tokens_per_s"]), default=None)
    peak = (row.get("memory") or {}).get("peak_rss_bytes")
    start = (row.get("start") or {}).get("ready_s")
    return (
        settings(row, rows),
        target,
        median_ms(measured[0], "ttft_ms", 0) if measured else NOTHING,
        median_ms(measured[0], "tpot_ms", 1) if measured else NOTHING,
        f"{best['output_tokens_per_s']:.1f} (at {best['concurrency']})" if best else "-",
        f"{expert_bytes(row) / GIB:.3g}" if expert_bytes(row) else "-",
        f"{peak / GIB:.2f}" if peak else "-",
        f"{start:.1f}" if start else "-",
        show_kl(found["kl"]["mean"]) if found else "-",
        f"{found['top1_agreement']:.1%}" if found else "-",
        result(row),
    )


def _in_markdown(cell: str) -> str:
    """Escapes a cell: no HTML, no end of a cell or row, no change of text direction."""
    return html.escape(printable(cell.replace("\n", " ")), quote=False).replace("|", "\\|")


def to_markdown(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    shown = [HEADINGS, *(line.cells for line in lines(rows))]
    text = [" | ".join(_in_markdown(cell) for cell in cells) for cells in shown]
    rule = " | ".join("---" if number in (0, 1, 10) else "---:" for number in range(len(HEADINGS)))
    return "\n".join([f"| {text[0]} |", f"| {rule} |", *(f"| {line} |" for line in text[1:]), "", NOTE, ""])


def to_json(rows: Sequence[Row]) -> str:
    """Everything known about the rows."""
    return json.dumps({"format": FORMAT, "rows": rows}, indent=1, ensure_ascii=False)


def to_csv(rows: Sequence[Row]) -> str:
    """One line per load; a row without loads has one line too."""
    lines_of_loads = [_flat(row, load) for row in rows for load in (row.get("loads") or [{}])]
    columns = list(dict.fromkeys(name for line in lines_of_loads for name in line))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines_of_loads)
    return out.getvalue()


def _flat(row: Row, load: dict[str, Any]) -> dict[str, Any]:
    found = quality(row, load.get("target", BASE)) or {}
    flat = {"job": row["number"], "overrides": shlex.join(row["overrides"])}
    flat |= {name: row.get(name) for name in ("state", "exit_code", "error", "began", "seconds", "run_folder")}
    flat |= {name: load.get(name) for name in LOAD_COLUMNS}
    for name in TIME_COLUMNS:
        flat |= {f"{name}_{kind}": (load.get(name) or {}).get(kind) for kind in ("mean", "median", "p90", "p99")}
    flat["start_s"] = (row.get("start") or {}).get("ready_s")
    flat |= {name: (row.get("memory") or {}).get(name) for name in ("peak_rss_bytes", "pss_bytes")}
    flat["expert_bytes"] = row.get("expert_bytes")
    flat |= {f"kl_{kind}": (found.get("kl") or {}).get(kind) for kind in ("mean", "max")}
    return flat | {"top1_agreement": found.get("top1_agreement")}
