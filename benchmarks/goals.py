"""The project's speed goals as code: what of the results counts for which goal, and whether it is reached."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from results_of import METHODS, PEER, Results


@dataclass(frozen=True)
class Finding:
    """One number of a goal. `noisy`: the machine was disturbed while it was measured."""

    label: str
    value: float
    bound: float
    at_least: bool
    unit: str
    noisy: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        text = f"{self.label} {self.value:{_digits(self.unit)}}{self.unit}{'~' if self.noisy else ''}"
        return text if self.met else f"**{text}** (goal {self.bound:{_digits(self.unit)}})"


def _digits(unit: str) -> str:
    return {" %": ".0f", "x": ".1f", " us": ".0f", " s": ".2f"}.get(unit, ".2f")


Findings = Iterator[Finding]


def one_token(results: Results) -> Findings:
    bounds = {"AMXBF16_SFT": 90.0, "AMXINT8_SFT": 80.0, "AMXINT4_SFT": 70.0}
    for method, shape, tokens in results.cells():
        record = results.ours(method, shape, "none", tokens)
        if tokens == 1 and record:
            label = f"{shape} {METHODS[method]}"
            yield Finding(label, 100 * record["limit"]["median"], bounds[method], True, " %", record["noisy"])


def few_tokens(results: Results) -> Findings:
    for method, shape, tokens in results.cells():
        record = results.ours(method, shape, "none", tokens)
        if tokens in (16, 64) and record:
            label = f"{shape} {METHODS[method]} {tokens}:"
            yield Finding(label, 100 * record["limit"]["median"], 70.0, True, " %", record["noisy"])


AVX512_PEAK = {
    ("AMXBF16_SFT", 256): 75.0,
    ("AMXBF16_SFT", 1024): 85.0,
    ("AMXINT8_SFT", 1024): 80.0,
    ("AMXINT4_SFT", 1024): 65.0,
}
AMX_PEAK = {("AMXBF16_SFT", 1024): 60.0, ("AMXINT8_SFT", 1024): 50.0}


def of_peak(bounds: dict[tuple[str, int], float]) -> Callable[[Results], Findings]:
    def findings(results: Results) -> Findings:
        for method, shape, tokens in results.cells():
            record = results.ours(method, shape, "none", tokens)
            if (method, tokens) in bounds and record:
                label = f"{shape} {METHODS[method]} {tokens}:"
                bound = bounds[method, tokens]
                yield Finding(label, 100 * record["of_peak"], bound, True, " %", record["noisy"])

    return findings


def against_peer(results: Results) -> Findings:
    amx = results.machine == "amx"
    for method, shape, tokens in results.cells():
        record = results.other(PEER, method, shape, "none", tokens)
        if record:
            bound = _peer_bound(method, tokens, amx)
            label = f"{shape} {METHODS[method]} {tokens}:"
            yield Finding(label, record["over_ours"]["median"], bound, True, "x", record["noisy"])


def _peer_bound(method: str, tokens: int, amx: bool) -> float:
    if amx:
        return 1.3 if tokens < 16 else 2.0 if tokens <= 256 else 1.8
    return 4.0 if tokens < 16 else 3.0 if tokens <= 256 else 2.0 if method == "AMXBF16_SFT" else 4.0


def _overheads(results: Results, cases: Iterable[str], counts: Iterable[int]) -> Iterator[tuple[str, float, dict]]:  # type: ignore[type-arg]
    for case in cases:
        for method, shape, tokens in results.cells(case):
            record = results.ours(method, shape, case, tokens)
            if tokens in counts and record and "over_without_adapters" in record:
                percent = 100 * (record["over_without_adapters"]["median"] - 1)
                yield f"{shape} {METHODS[method]} {case}", percent, record


def adapter_decode(results: Results) -> Findings:
    for label, percent, record in _overheads(results, ("1x8", "1x16", "1x64"), (1,)):
        yield Finding(label, percent, 1.5 * byte_share(record) + 2, False, " %", record["noisy"])


def byte_share(record: dict) -> float:  # type: ignore[type-arg]
    """Percent of the base weights' bytes that the adapters add in a batch."""
    return float(100 * record["lora_bytes"] / (record["distinct_experts"] * record["expert_bytes"]))


def adapter_prefill(results: Results) -> Findings:
    bounds = {"1x16": 6.0, "1x64": 16.0, "8x16idle": 1.0}
    one = {}
    for label, percent, record in _overheads(results, bounds, (1024,)):
        one[label] = percent
        yield Finding(label, percent, bounds[record["adapter_case"]], False, " %", record["noisy"])
    for label, percent, record in _overheads(results, ("8x16",), (1024,)):
        alone = one.get(label.replace("8x16", "1x16"))
        if alone is not None:
            yield Finding(label, percent, 1.3 * max(alone, 0.0), False, " %", record["noisy"])


def threads(results: Results) -> Findings:
    """Compute: 1024 tokens. The goal of 12 of 16 is three quarters of whatever number of cores there is."""
    rows = [row for row in results.conditions.get("scaling", []) if row["tokens"] == 1024]
    most = _cores(results)
    for row in rows:
        if row["threads"] == most:
            label = f"{METHODS[row['method']]} {most} threads"
            yield Finding(label, row["speedup"]["median"], 0.75 * most, True, "x")
    for row in results.conditions.get("competing", []):
        if row["impl"] == "kt_kernels" and row["tokens"] == 1:
            yield Finding(f"{METHODS[row['method']]} beside a busy thread", row["slowdown"]["median"], 3.0, False, "x")


def _cores(results: Results) -> int:
    return max((record["threads"] for record in results.records), default=0)


def overhead(results: Results) -> Findings:
    for row in results.conditions.get("overhead", []):
        yield Finding(f"{METHODS[row['method']]}, {row['threads']} threads", row["median_us"], 20.0, False, " us")


def load(results: Results) -> Findings:
    for row in results.conditions.get("load", []):
        name = METHODS[row["method"]]
        yield Finding(f"{name} rate", 100 * row["of_read_rate"], 80.0, True, " %")
        yield Finding(f"{name} peak memory", row["peak_over_packed"], 1.15, False, "×")
        if "mapped_gbs" in row:
            yield Finding(f"{name} mapped", 100 * row["mapped_of_file_read"], 95.0, True, " %")
            yield Finding(f"{name} mapped peak", row["mapped_peak_over_packed"], 1.15, False, "×")


def launcher(results: Results) -> Findings:
    bounds = {"plan, fresh process": 0.5, "completion, bash": 0.2, "start beyond stock, with adapter": 2.0}
    for row in results.conditions.get("launcher", []):
        if row["what"] in bounds:
            yield Finding(row["what"], row["median_s"], bounds[row["what"]], False, " s")


GOALS: list[tuple[str, str, Callable[[Results], Findings]]] = [
    ("1", "1 token, share of the read rate: BF16 ≥ 90 %, INT8 ≥ 80 %, INT4 ≥ 70 %", one_token),
    ("2", "16 to 64 tokens ≥ 70 % of ideal", few_tokens),
    ("3", "AVX-512: BF16 ≥ 75 / 85 % of peak at 256 / 1024 tokens, INT8 ≥ 80 %, INT4 ≥ 65 %", of_peak(AVX512_PEAK)),
    ("4", "AMX, 1024 tokens: BF16 ≥ 60 % of peak, INT8 ≥ 50 %", of_peak(AMX_PEAK)),
    ("5", "times as fast as kt-kernel", against_peer),
    ("6", "one adapter at 1 token ≤ 1.5 × its byte share + 2 points", adapter_decode),
    ("7", "adapters at 1024 tokens: r16 ≤ 6 %, r64 ≤ 16 %, 8 ≤ 1.3 × one, idle ≤ 1 %", adapter_prefill),
    ("8", "N threads ≥ 0.75 N × one; a competing busy thread costs ≤ 3×", threads),
    ("9", "overhead of a layer ≤ 20 µs", overhead),
    ("10", "first load ≥ 80 % of the warm read rate, mapped cache ≥ 95 %; peak memory ≤ 1.15 × packed", load),
    ("11", "plan ≤ 0.5 s, completion ≤ 0.2 s, start ≤ 2 s beyond stock", launcher),
]
ONLY = {"3": ("avx512", "xeon512"), "4": ("amx",), "11": ("avx512",)}
