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
PREFILL = (1, 16, 64, 256, 1024)
DETAILED = "v2-lite"
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
    for name in rates[0] if rates else ():
        values = [rate[name] for rate in rates]
        rows.append((f"peak {name}", f"{min(values):.0f} – {max(values):.0f}"))
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


def speed_table(results: Results, shape: str) -> Lines:
    rows = []
    for method, name, tokens in results.cells():
        ours = results.ours(method, name, "none", tokens)
        if name != shape or not ours:
            continue
        peer = results.other(PEER, method, name, "none", tokens)
        loop, grouped = (results.other(i, method, name, "none", tokens) for i in ("torch_loop", "torch_grouped_mm"))
        rows.append(
            (
                f"{METHODS[method]} {tokens}",
                marked(ours, f"{ours['ms']:.3g}"),
                f"{ours['weight_gbs']:.1f}",
                f"{ours['gflops']:.0f}",
                f"{100 * ours['limit']['median']:.0f} %",
                f"{100 * ours['of_peak']:.0f} %",
                *(ratio(other["over_ours"]) if other else MISSING for other in (peer, loop, grouped)),
            )
        )
    heads = ("tokens", "ms", "GB/s", "GFLOP/s", "of ideal", "of peak", "kt-kernel", "torch loop", "torch grouped")
    return table(heads, rows)


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


def shapes_table(results: Results) -> Lines:
    """The shapes that have no table of their own: a row a method, a column a token count."""
    rows = []
    for shape in results.shapes():
        for method in METHODS if shape != DETAILED else ():
            cells = [results.ours(method, shape, "none", tokens) for tokens in PREFILL]
            if any(cells):
                experts = next(f"{cell['experts']} of {cell['model_experts']}" for cell in cells if cell)
                rows.append(
                    (f"{shape} {METHODS[method]}, {experts} experts", *(_short(results, cell) for cell in cells))
                )
    return table(("of ideal (time of kt-kernel / ours)", *(f"{tokens} tokens" for tokens in PREFILL)), rows)


def _short(results: Results, ours: Record | None) -> str:
    if not ours:
        return MISSING
    peer = results.other(PEER, ours["method"], ours["shape"], "none", ours["tokens"])
    times = f" ({peer['over_ours']['median']:.1f}×)" if peer else ""
    return marked(ours, f"{100 * ours['limit']['median']:.0f} %") + times


def conditions_table(results: Results) -> Lines:
    """A row a condition, a column a method; others than ours are named."""
    cells: dict[str, dict[str, str]] = {}

    def put(what: str, method: str, text: str) -> None:
        cells.setdefault(what, {})[METHODS[method]] = text

    for row in results.conditions.get("scaling", []):
        if row["threads"] > 1:
            what = f"{row['threads']} threads over one, {row['tokens']} token{'s' * (row['tokens'] > 1)}"
            put(what, row["method"], f"{row['speedup']['median']:.2f}×")
    for row in results.conditions.get("competing", []):
        name = "" if row["impl"] == OURS else f", {row['impl']}"
        put(f"beside a busy thread over alone, {row['tokens']} tokens{name}", row["method"], ratio(row["slowdown"]))
    for row in results.conditions.get("overhead", []):
        text = f"{row['median_us']:.1f} µs ({row['after_pause_us']:.0f})"
        put("a call with next to nothing to compute (after a pause)", row["method"], text)
    for row in results.conditions.get("load", []):
        rate = f"{row['source_gbs']:.2f} GB/s, {100 * row['of_read_rate']:.0f} %"
        put("first load: BF16 read, share of the read rate", row["method"], rate)
        put("first load: peak memory over packed size", row["method"], f"{row['peak_over_packed']:.3f}")
    for row in results.conditions.get("soak", []):
        put(f"memory growth over {row['forwards']} forwards", row["method"], f"{row['growth_bytes']} bytes")
    rows = [(what, *(found.get(name, MISSING) for name in METHODS.values())) for what, found in cells.items()]
    return table(("", *METHODS.values()), rows)


def launcher_table(results: Results) -> Lines:
    rows = []
    for row in results.conditions.get("launcher", []):
        low, high = row["quartiles_s"]
        wall = f"{row['median_s']:.3f} ({low:.3f} – {high:.3f})"
        rows.append((row["what"], wall, f"{row['cpu_s']:.3f}", str(row["rounds"])))
    return table(("", "seconds (quartiles)", "CPU seconds", "rounds"), rows)


def tables(folder: Path) -> dict[str, Callable[[], Lines]]:
    found: dict[str, Callable[[], Lines]] = {}
    for machine in MACHINES:
        results = read_results(folder, machine)
        makers: dict[str, Any] = {
            "host": host_table,
            "goals": goals_table,
            "adapters": adapters_table,
            "conditions": conditions_table,
            "shapes": shapes_table,
        }
        for name, make in makers.items():
            found[f"{machine}-{name}"] = lambda make=make, results=results: make(results)
        found[f"{machine}-{DETAILED}"] = lambda results=results: speed_table(results, DETAILED)
    local = read_results(folder, MACHINES[0])
    found["first-light"] = lambda: first_light_table(local)
    found["accuracy"] = lambda: accuracy_table(folder, local)
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
