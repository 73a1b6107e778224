"""Writes the tables of docs/performance.md from the results: python benchmarks/report.py [--check].

A table stands between `<!-- table NAME -->` and `<!-- end -->`; what is around them is written by hand.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from goals import GOALS, ONLY, byte_share
from results_of import METHODS, OURS, PEER, Record, Results, read_results

TABLE = re.compile(r"(<!-- table (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
MACHINES = ("avx512", "amx")
TOKENS = (1, 4, 16, 64, 256, 1024)
PREFILL = (1, 16, 64, 256, 1024)
SHOWN = 9  # findings of a goal that stand in its row even where they are reached
NOT_YET = "Not measured yet."
MEASURED, MISSING = "measured", "–"
Lines = list[str]


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> Lines:
    heads, rows = list(heads), list(rows)
    if not rows:
        return [NOT_YET]
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def ratio(values: dict[str, float] | None) -> str:
    return f"{values['median']:.2f} ({values['low']:.2f}–{values['high']:.2f})" if values else MISSING


def marked(record: Record, text: str) -> str:
    return text + ("~" if record["noisy"] else "")


def host_table(results: Results) -> Lines:
    if not results.runs:
        return [NOT_YET]
    facts = results.runs[0]["host"]
    rates = [record["peaks"] for record in results.records]
    rows = [
        ("CPU", f"{facts['cpu']}, {', '.join(facts['flags'])}; {facts['memory_gib']:.0f} GiB"),
        ("threads", ", ".join(sorted({str(r["threads"]) for r in results.records if r["impl"] == "kt_kernels"}))),
        ("software", f"Linux {facts['kernel']}, Python {facts['python']}, torch {facts['torch']}"),
    ]
    spans = {name: [rate[name] for rate in rates] for name in (rates[0] if rates else ())}
    rows.append(("peaks", ", ".join(f"{name} {min(v):.0f}–{max(v):.0f}" for name, v in spans.items())))
    return table(("", MEASURED), rows)


def goals_table(results: Results) -> Lines:
    if not results.runs:
        return [NOT_YET]
    rows = []
    for number, text, findings in GOALS:
        if ONLY.get(number, results.machine) != results.machine:
            continue
        found = list(findings(results))
        met = sum(finding.met for finding in found)
        shown = found if len(found) <= SHOWN else [finding for finding in found if not finding.met]
        rows.append((number, text, f"{met} of {len(found)}", "; ".join(map(str, shown)) or "not measured"))
    return table(("", "goal", "reached", f"measured; of more than {SHOWN}, what is not reached"), rows)


def speed_table(results: Results) -> Lines:
    """A row a shape and method, a column a token count; below BF16 torch's times over ours."""
    rows = []
    for shape in results.shapes():
        for method in METHODS:
            cells = [results.ours(method, shape, "none", tokens) for tokens in TOKENS]
            if not any(cells):
                continue
            experts = next(f", {c['experts']} experts" if c["experts"] < c["model_experts"] else "" for c in cells if c)
            rows.append((f"{shape} {METHODS[method]}{experts}", *(_speed(results, cell) for cell in cells)))
            torch = [_torch(results, method, shape, tokens) for tokens in TOKENS]
            if any(torch):
                rows.append(("torch loop, grouped", *(text or MISSING for text in torch)))
    return table(("", *(f"{tokens} tokens" for tokens in TOKENS)), rows)


def _torch(results: Results, method: str, shape: str, tokens: int) -> str:
    """Times of the loop and of _grouped_mm over ours."""
    others = [results.other(impl, method, shape, "none", tokens) for impl in ("torch_loop", "torch_grouped_mm")]
    return ", ".join(f"{other['over_ours']['median']:.2f}" for other in others if other)


def _speed(results: Results, ours: Record | None) -> str:
    if not ours:
        return MISSING
    peer = results.other(PEER, ours["method"], ours["shape"], "none", ours["tokens"])
    shares = f"{100 * ours['limit']['median']:.0f} % · {100 * ours['of_peak']:.0f} %"
    return f"{marked(ours, format(ours['ms'], '.3g'))} ms · {shares} · {ratio(peer['over_ours']) if peer else MISSING}"


def adapters_table(results: Results) -> Lines:
    """A row a shape and case, a column a method, in it the medians of all token counts."""
    cases = dict.fromkeys(r["adapter_case"] for r in results.records if "over_without_adapters" in r)
    rows = []
    for case in cases:
        for shape in dict.fromkeys(shape for _, shape, _ in results.cells(case)):
            rows.append((f"{shape} {case}", *(_overheads(results, method, shape, case) for method in METHODS)))
    return table(("", *METHODS.values()), rows)


def _overheads(results: Results, method: str, shape: str, case: str) -> str:
    cells = [results.ours(method, shape, case, tokens) for tokens in PREFILL]
    if not any(cells):
        return MISSING
    share = f" ({byte_share(cells[0]):.1f})" if cells[0] else ""
    return " / ".join(_overhead(cell) for cell in cells) + share


def _overhead(record: Record | None) -> str:
    if not record:
        return MISSING
    return marked(record, f"{100 * (record['over_without_adapters']['median'] - 1):+.0f}")


def first_light_table(results: Results) -> Lines:
    rows = []
    for tokens in (1, 16, 256):
        ours = results.ours("AMXBF16_SFT", "v2-lite", "none", tokens)
        loop = results.other("torch_loop", "AMXBF16_SFT", "v2-lite", "none", tokens)
        if ours and loop:
            rows.append((str(tokens), f"{ours['ms']:.2f}", f"{loop['ms']:.2f}", ratio(loop["over_ours"])))
    return table(("tokens", "kt_kernels, ms", "torch loop, ms", "torch / kt_kernels"), rows)


def accuracy_table(folder: Path, results: Results) -> Lines:
    file = folder / "accuracy.json"
    if not file.exists():
        return [NOT_YET]
    found = json.loads(file.read_text())
    rows = []
    for row in found["gaussian"]:
        method = row["method"]
        peer = results.other(PEER, method, "v2-lite", "none", 64)
        real = [entry for entry in found.get("real", []) if entry["method"] == method]
        kl = [f"{entry['kl']['mean']:.1e} / {100 * entry['top1_agreement']:.1f} %" for entry in real]
        error, theirs = f"{100 * row['rel_l2']:.2f} %", f"{100 * peer['rel_l2']:.2f} %" if peer else MISSING
        rows.append((METHODS[method], f"{row['bits_per_weight']:.2f}", error, theirs, *(kl or [MISSING] * 2)))
    heads = ("", "bits a weight", "relative L2", "kt-kernel's", "demo: KL, nats / top-1", "demo:west")
    return table(heads, rows)


def conditions_table(results: Results) -> Lines:
    """A row a condition, a column a method; others than ours are named."""
    cells: dict[str, dict[str, str]] = {}

    def put(what: str, method: str, text: str) -> None:
        found = cells.setdefault(what, {})
        found[METHODS[method]] = found.get(METHODS[method], "") + text

    scaling = results.conditions.get("scaling", [])
    most = max((row["threads"] for row in scaling), default=0)
    for row in scaling:
        if most - 1 <= row["threads"] <= most and row["threads"] > 1 and row["tokens"] != 64:
            what = f"{most} threads over one, {row['tokens']} token{'s' * (row['tokens'] > 1)}"
            text = f"{row['speedup']['median']:.2f}×"
            put(what, row["method"], text if row["threads"] == most else f"{row['threads']}: {text}, {most}: ")
    for row in (row for row in results.conditions.get("competing", []) if row["tokens"] == 1):
        name = "" if row["impl"] == OURS else f", {row['impl']}"
        put(f"beside a busy thread over alone, 1 token{name}", row["method"], ratio(row["slowdown"]))
    for row in results.conditions.get("overhead", []):
        text = f"{row['median_us']:.1f} µs ({row['after_pause_us']:.0f})"
        put("a call with next to nothing to compute (after a pause)", row["method"], text)
    for row in results.conditions.get("load", []):
        rate = f"{row['source_gbs']:.2f} GB/s, {100 * row['of_read_rate']:.0f} %"
        put("first load: BF16 taken in, share of the warm read rate", row["method"], rate)
        put("first load: peak memory over packed size", row["method"], f"{row['peak_over_packed']:.3f}")
        if "mapped_gbs" in row:
            mapped = f"{row['mapped_gbs']:.1f} GB/s, {100 * row['mapped_of_file_read']:.0f} %"
            put("from a mapped file, cached: rate, share of reading it", row["method"], mapped)
            peak = f"{row['mapped_ms']:.2f} ms, {row['mapped_peak_over_packed']:.3f}"
            put("from a mapped file: until it answers, peak memory over packed size", row["method"], peak)
    for row in results.conditions.get("soak", []):
        put(f"memory growth over {row['forwards']} forwards", row["method"], f"{row['growth_bytes']} bytes")
    rows = [(what, *(found.get(name, MISSING) for name in METHODS.values())) for what, found in cells.items()]
    return table(("", *METHODS.values()), rows)


def launcher_table(results: Results) -> Lines:
    rows = []
    shown = (row for row in results.conditions.get("launcher", []) if "start, ours" not in row["what"])
    for row in shown:
        low, high = row["quartiles_s"]
        wall = f"{row['median_s']:.3f} ({low:.3f} – {high:.3f})"
        rows.append((row["what"], wall, f"{row['cpu_s']:.3f}", str(row["rounds"])))
    return table(("", "seconds (quartiles)", "CPU seconds", "rounds"), rows)


def load_times_table(folder: Path) -> Lines:
    """Of load_times.py: a server's own time for its weights, beside what safetensors takes to read the checkpoint."""
    file = folder / "load_times.json"
    if not file.exists():
        return [NOT_YET]
    found = json.loads(file.read_text())
    rows = []
    for name, row in found["starts"].items():
        read_s = found["checkpoint_gb"] / found["safetensors_gbs"]["cold" if "cold" in name else "warm"]
        rows.append((name, f"{row['load_s']:.2f} s", f"{read_s:.2f} s", f"{read_s / row['load_s']:.0%}", row["cache"]))
    heads = (f"{found['method']}, {found['checkpoint_gb']:.1f} GB", "weights loaded", "read alone", "share", "cache")
    return table(heads, rows)


def tables(folder: Path) -> dict[str, Callable[[], Lines]]:
    found: dict[str, Callable[[], Lines]] = {}
    for machine in MACHINES:
        results = read_results(folder, machine)
        makers: dict[str, Any] = {
            "host": host_table,
            "goals": goals_table,
            "adapters": adapters_table,
            "conditions": conditions_table,
            "speed": speed_table,
        }
        for name, make in makers.items():
            found[f"{machine}-{name}"] = lambda make=make, results=results: make(results)
    local = read_results(folder, MACHINES[0])
    found["first-light"] = lambda: first_light_table(local)
    found["accuracy"] = lambda: accuracy_table(folder, local)
    found["load-times"] = lambda: load_times_table(folder)
    found["launcher"] = lambda: launcher_table(local)
    return found


def filled(page: str, makers: dict[str, Callable[[], Lines]]) -> str:
    """The page with its tables made anew; a table of which there are no results says so."""

    def fill(match: re.Match[str]) -> str:
        make = makers.get(match["name"], lambda: [NOT_YET])
        return match[1] + "\n".join(make()) + "\n" + match[3]

    return TABLE.sub(fill, page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--page", type=Path, default=Path("docs/performance.md"))
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a table differs")
    options = parser.parse_args()
    before = options.page.read_text()
    after = filled(before, tables(options.results))
    if not options.check:
        options.page.write_text(after)
    elif before != after:
        print(f"{options.page}: its tables are not those of {options.results}; run python benchmarks/report.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
