"""Writes the tables of docs/performance.md from the results: python benchmarks/report.py [--check].

A table stands between `<!-- table NAME -->` and `<!-- end -->`; what is around them is written by hand.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from goals import GOALS, ONLY, Finding, byte_share
from results_of import METHODS, OURS, PEER, Record, Results, read_results

GPU_PAGE = Path(__file__).resolve().parents[1] / "docs" / "gpu.md"
METHOD_ORDER, ROW_ORDER = ("INT4", "INT8", "BF16"), ("base", "one", "the")
REQUESTS, PROMPT = (1, 4, 16, 64), 2048
"""What docs/gpu.md measures: requests at the same time, and the tokens of a prompt."""
TABLE = re.compile(r"(<!-- table (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
MACHINES = ("avx512", "amx", "xeon512", "avx2")  # xeon512: amx once more, held to AVX-512
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


def hosts_table(machines: list[Results]) -> Lines:
    kinds: dict[str, Callable[[Results], str]] = {
        "CPU": lambda results: f"{_facts(results)['cpu']}: {', '.join(_facts(results)['flags'])}",
        "memory": lambda results: f"{_facts(results)['memory_gib']:.0f} GiB",
        "threads": lambda results: str(max((r["threads"] for r in results.records), default=MISSING)),
        "software": lambda results: "Linux {kernel}, Python {python}, torch {torch}".format(**_facts(results)),
        "peaks": _peaks,
    }
    rows = [
        (kind, *(text(results) if results.runs else NOT_YET for results in machines)) for kind, text in kinds.items()
    ]
    return table(("", *(results.machine for results in machines)), rows)


def _facts(results: Results) -> dict[str, Any]:
    facts: dict[str, Any] = results.runs[0]["host"]
    return facts


def _peaks(results: Results) -> str:
    """Smallest and largest of all groups."""
    rates = [record["peaks"] for record in results.records]
    spans = {name: [rate[name] for rate in rates] for name in (rates[0] if rates else ())}
    return ", ".join(f"{name} {min(values):.0f}–{max(values):.0f}" for name, values in spans.items())


def goals_table(machines: list[Results]) -> Lines:
    rows = [
        (number, text, *(_findings(number, results, findings) for results in machines))
        for number, text, findings in GOALS
    ]
    return table(("", "goal", *(f"{results.machine}: reached" for results in machines)), rows)


def _findings(number: str, results: Results, findings: Callable[[Results], Iterable[Finding]]) -> str:
    """How many are reached, then all of them if they are few, else those that are not reached."""
    found = list(findings(results)) if results.machine in ONLY.get(number, MACHINES) else []
    if not found:
        return MISSING
    shown = found if len(found) <= SHOWN else [finding for finding in found if not finding.met]
    return f"{sum(finding.met for finding in found)} of {len(found)}: {'; '.join(map(str, shown))}"


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
    return table(("", *(f"{tokens} token{'s' * (tokens > 1)}" for tokens in TOKENS)), rows)


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


def conditions_table(machines: list[Results]) -> Lines:
    """A row a condition, a column a machine and method; others than ours are named."""
    cells: dict[str, dict[str, str]] = {}
    heads = [f"{results.machine} {name}" for results in machines for name in METHODS.values()]
    for results in machines:
        for what, method, text in _conditions(results):
            found = cells.setdefault(what, {})
            head = f"{results.machine} {METHODS[method]}"
            found[head] = f"{found[head]}, {text}" if head in found else text
    return table(("", *heads), [(what, *(found.get(head, MISSING) for head in heads)) for what, found in cells.items()])


def _conditions(results: Results) -> Iterator[tuple[str, str, str]]:
    """What was measured, of which method, and what came out."""
    conditions = results.conditions
    scaling = conditions.get("scaling", [])
    most = max((row["threads"] for row in scaling), default=0)
    for row in scaling:
        if most - 1 <= row["threads"] <= most and row["threads"] > 1 and row["tokens"] != 64:
            text = f"{row['threads']}: {row['speedup']['median']:.2f}×"
            yield f"N−1 and N threads over one, {row['tokens']} token{'s' * (row['tokens'] > 1)}", row["method"], text
    for row in (row for row in conditions.get("competing", []) if row["tokens"] == 1):
        name = "" if row["impl"] == OURS else f", {row['impl']}"
        yield f"beside a busy thread over alone, 1 token{name}", row["method"], ratio(row["slowdown"])
    for row in conditions.get("overhead", []):
        text = f"{row['median_us']:.1f} µs ({row['after_pause_us']:.0f})"
        yield "a call with next to nothing to compute (after a pause)", row["method"], text
    yield from _loading(conditions.get("load", []))
    for row in conditions.get("soak", []):
        yield f"memory growth over {row['forwards']} forwards", row["method"], f"{row['growth_bytes']} bytes"


def _share(share: float) -> str:
    """Beyond the whole only noise is left to compare."""
    return f"{100 * share:.0f} %" if share < 1 else "over 100 %"


def _loading(rows: list[Record]) -> Iterator[tuple[str, str, str]]:
    for row in rows:
        method = row["method"]
        rate = f"{row['source_gbs']:.2f} GB/s, {100 * row['of_read_rate']:.0f} %"
        yield "first load: BF16 taken in, share of the warm read rate", method, rate
        mapped = f"{row['mapped_ms']:.2f} ms, {_share(row['mapped_of_file_read'])}"
        yield "mapped from a file: until it answers, share of reading the file", method, mapped
        peaks = f"{row['peak_over_packed']:.3f}, {row['mapped_peak_over_packed']:.3f}"
        yield "peak memory over packed size: packed, mapped", method, peaks


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
        share = "pages come later" if row["cache"] == "mapped" else _share(read_s / row["load_s"])
        rows.append((f"{name} start", f"{row['load_s']:.2f} s", f"{read_s:.2f} s", share, row["cache"]))
    for name, rate in found.get("mapped_gbs", {}).items():
        size, alone = found["packed_gb"], found["safetensors_gbs"][name]
        what = f"all mapped pages touched, {name}"
        rows.append((what, f"{size / rate:.2f} s", f"{size / alone:.2f} s", _share(rate / alone), "mapped"))
    heads = (f"{found['method']}, {found['checkpoint_gb']:.1f} GB", "weights loaded", "read alone", "share", "cache")
    return table(heads, rows)


def tokens_table(page: Path) -> Lines:
    """Tokens a second out of the milliseconds of docs/gpu.md, whose rows are written by hand from its measurements: of
    several tables with a row of that name, the first."""
    text = page.read_text(encoding="utf-8")
    steps: dict[str, list[str]] = {}
    prompts: dict[str, str] = {}
    for found in _tables_with(text, "| 1 request |"):
        steps = found | steps
    for found in _tables_with(text, "| over the link |"):
        at = found[""].index(str(PROMPT))
        prompts = {name: cells[at] for name, cells in found.items()} | prompts
    rows = []
    shown = (name for name in steps if re.match(r"(BF16|INT8|INT4), (base|one adapter|.* resident)", name))
    for name in sorted(shown, key=lambda name: (METHOD_ORDER.index(name[:4]), ROW_ORDER.index(name.split()[1]))):
        cells = steps[name]
        rates = [f"{count * 1000 / _first_number(ms):.0f}" for count, ms in zip(REQUESTS, cells, strict=True)]
        prompt = prompts.get(name)
        rows.append((name, *rates, f"{PROMPT * 1000 / _first_number(prompt):,.0f}" if prompt else MISSING))
    return table(("experts", *(f"{count} request{'s' * (count > 1)}" for count in REQUESTS), "prompt"), rows)


def _tables_with(page: str, heading: str) -> list[dict[str, list[str]]]:
    return [_rows_from(page[page.rindex("\n", 0, at.start()) + 1 :]) for at in re.finditer(re.escape(heading), page)]


def _rows_from(page: str) -> dict[str, list[str]]:
    """The rows of the table that a page begins with, by what they name; the heading's under ''."""
    lines = page.splitlines()
    found: dict[str, list[str]] = {}
    for line in lines:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip(" *") for cell in line.strip("|").split("|"))
        found[re.sub(r"\*\*| \(.*\)|, a minute later", "", name) if found else ""] = cells
    return found


def _first_number(cell: str) -> float:
    found = re.search(r"[\d.]+", cell)
    assert found, f"no number in {cell!r}"
    return float(found[0])


def tables(folder: Path) -> dict[str, Callable[[], Lines]]:
    machines = [read_results(folder, machine) for machine in MACHINES]
    local, amx, xeon512, avx2 = machines
    return {
        "tokens": lambda: tokens_table(GPU_PAGE),
        "hosts": lambda: hosts_table(machines),
        "goals": lambda: goals_table(machines),
        "conditions": lambda: conditions_table([local, amx, avx2]),
        "avx512-speed": lambda: speed_table(local),
        "amx-speed": lambda: speed_table(amx),
        "xeon512-speed": lambda: speed_table(xeon512),
        "avx2-speed": lambda: speed_table(avx2),
        "avx2-adapters": lambda: adapters_table(avx2),
        "avx512-adapters": lambda: adapters_table(local),
        "amx-adapters": lambda: adapters_table(amx),
        "first-light": lambda: first_light_table(local),
        "accuracy": lambda: accuracy_table(folder, local),
        "load-times": lambda: load_times_table(folder),
        "launcher": lambda: launcher_table(local),
    }


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
