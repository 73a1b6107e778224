"""One cell of the table: shape, method, adapters, token count. Checks all contenders, times them, makes records."""

import time
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import host
import torch
from cases import (
    AdapterCase,
    Batch,
    Lora,
    Need,
    Shape,
    Weights,
    checked_part,
    make_batches,
    need_of,
    reference,
    relative_l2,
)
from contenders import WRONG_ABOVE, Contender, Limit, Ours, OursAs
from peaks import Peaks, ReadRate
from rounds import Ratio, Timing, ratio_of, run_rounds

UNEQUAL = 0.1  # of ours a second time over ours: more means that the cell was disturbed, whatever the peaks say
AGAIN, WITHOUT = "again", "without"  # names of ours a second time, and of ours without the adapters
Record = dict[str, Any]


@dataclass
class References:
    """Float32 results of a shape's cases, which all methods and contenders share."""

    weights: Weights
    _kept: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)

    def of(self, adapters: AdapterCase, loras: list[Lora], batch: Batch) -> torch.Tensor:
        key = adapters.name, batch.tokens
        if key not in self._kept:
            self._kept[key] = reference(self.weights, loras, checked_part(batch)[0])
        return self._kept[key]


@dataclass
class Cell:
    shape: Shape
    method: str
    adapters: AdapterCase
    tokens: int
    loras: list[Lora]
    distinct_contents: int  # fewer than experts where packing takes too long
    refused: list[str] = field(default_factory=list)
    slow: list[Contender] = field(default_factory=list)
    """Those of which one call takes too much of the cell's time."""

    def __post_init__(self) -> None:
        self.batches = make_batches(self.shape, self.tokens, self.adapters)
        self.needs = [need_of(self.shape, batch, self.loras) for batch in self.batches]

    def __str__(self) -> str:
        return f"{self.shape.name} {self.method} adapters {self.adapters.name}, {self.tokens} tokens"

    def error_of(self, contender: Contender, references: References) -> float:
        expected = references.of(self.adapters, self.loras, self.batches[0])
        rows = checked_part(self.batches[0])[1]
        return relative_l2(contender.result(self.batches[0], 0)[rows], expected)

    def right_ones(self, contenders: list[Contender], references: References, most_s: float) -> dict[str, float]:
        """Relative L2 of those whose result is right; the others are refused, and so is one that fails, or whose call
        takes a quarter of the cell's time (torch multiplies bfloat16 one by one where the CPU has no instruction)."""
        errors = {}
        for contender in contenders:
            begun = time.perf_counter()
            try:
                error = self.error_of(contender, references)
            except Exception as failure:  # one implementation that fails must not cost the others their results
                self.refused.append(f"{self}: {contender.impl} failed: {failure}")
                continue
            limit = WRONG_ABOVE[contender.method]
            call_s = time.perf_counter() - begun
            if call_s > most_s / 4 and contender is not contenders[0]:
                self.slow.append(contender)
                self.refused.append(f"{self}: {contender.impl} takes {call_s:.1f} s a call; not timed")
            elif error <= limit:
                errors[contender.impl] = error
            else:
                text = f"{contender.impl} is off by {error:.3g} relative L2, allowed {limit}; not timed"
                self.refused.append(f"{self}: {text}")
        return errors

    def measure(
        self,
        ours: Ours,
        others: list[Contender],
        references: References,
        budget_s: float,
        most_s: float,
        limits: tuple[ReadRate, Peaks],
    ) -> list[Record]:
        errors = self.right_ones([ours, *others], references, most_s)
        if ours.impl not in errors:
            return []
        again = OursAs(ours, AGAIN, adapters=self.adapters.count > 0)
        without = [OursAs(ours, WITHOUT, adapters=False)] if self.adapters.count else []
        limit = Limit(ours, *limits, self.needs)
        runners: list[Contender] = [ours, again, *without, limit, *(other for other in others if other.impl in errors)]
        timings = run_rounds(runners, self.batches, budget_s, most_s=most_s)
        by_name = {runner.impl: timing for runner, timing in zip(runners, timings, strict=True)}
        aa = ratio_of(by_name[AGAIN], by_name[ours.impl])
        records = []
        for runner in runners:
            if runner.impl in (AGAIN, WITHOUT, limit.impl):
                continue
            record = self.record(runner, by_name[runner.impl], errors[runner.impl])
            record["aa"] = vars(aa)
            if runner is not ours:
                record["over_ours"] = vars(ratio_of(by_name[runner.impl], by_name[ours.impl]))
                records.append(record)
                continue
            record["limit"] = vars(ratio_of(by_name[limit.impl], by_name[ours.impl]))
            if without:
                record["over_without_adapters"] = vars(ratio_of(by_name[ours.impl], by_name[WITHOUT]))
            records.append(record)
        return records

    def record(self, runner: Contender, timing: Timing, error: float) -> Record:
        pool_bytes = runner.layers * self.shape.experts * runner.expert_bytes
        quartiles = ratio_of(timing, Timing([1.0] * len(timing.seconds)))
        base_bytes = fmean(need.experts for need in self.needs) * runner.expert_bytes
        return {
            "impl": runner.impl,
            "method": runner.method if runner.isa != "torch" else "BF16",
            "isa": runner.isa,
            "shape": self.shape.name,
            "tokens": self.tokens,
            "adapters": self.adapters.count,
            "rank": self.adapters.rank,
            "threads": runner.threads,
            "ms": timing.median_ms,
            "ms_quartiles": [quartiles.low * 1e3, quartiles.high * 1e3],
            "ms_best": timing.best_ms,
            "weight_gbs": base_bytes / timing.median_ms / 1e6,
            "gflops": fmean(_operations(need) for need in self.needs) / timing.median_ms / 1e6,
            "rel_l2": error,
            "adapter_case": self.adapters.name,
            "cell_method": self.method,
            "rounds": len(timing.seconds),
            "experts": self.shape.experts,
            "distinct_contents": self.distinct_contents,
            "model_experts": self.shape.model_experts,
            "distinct_experts": fmean(need.experts for need in self.needs),
            "expert_bytes": runner.expert_bytes,
            "lora_bytes": fmean(need.lora_bytes for need in self.needs),
            "layers": runner.layers,
            "pool_bytes": pool_bytes,
            "pool_over_l3": pool_bytes / host.l3_bytes(),
            "measured_at": time.strftime("%Y-%m-%d %H:%M:%S"),
        }

    def add_limits(self, records: list[Record], peaks: Peaks, drift: float, noisy: bool) -> None:
        """What the peaks around the group say about its records."""
        for record in records:
            sizes = [need.experts * record["expert_bytes"] + need.lora_bytes for need in self.needs]
            ideals = [
                peaks.ideal_ms(size, _operations(need), record["method"], record["isa"])
                for size, need in zip(sizes, self.needs, strict=True)
            ]
            record["ideal_ms"] = fmean(ideals)
            record["of_ideal"] = record["ideal_ms"] / record["ms"]
            record["of_read"] = record["weight_gbs"] / peaks.read_gbs
            record["of_peak"] = record["gflops"] / peaks.gops(record["method"], record["isa"])
            record.update(peaks=peaks.rates, drift=drift, noisy=noisy or disturbed(record))


def disturbed(record: Record) -> bool:
    """Whether the A/A pair of its cell came out unequal."""
    return bool(abs(record["aa"]["median"] - 1) > UNEQUAL)


def _operations(need: Need) -> float:
    return need.base_operations + need.lora_operations


def of_limit(record: Record) -> float:
    """The share of what the machine allows: of ours in the same rounds, of others by the peaks around them."""
    return float(record["limit"]["median"] if "limit" in record else record["of_ideal"])


def show(record: Record) -> str:
    """A line of the printed table."""
    ratio = ""
    if "over_ours" in record:
        ratio = f"{Ratio(**record['over_ours'])} x ours"
    elif "over_without_adapters" in record:
        ratio = f"{Ratio(**record['over_without_adapters'])} x without adapters"
    aa = Ratio(**record["aa"])
    return (
        f"{record['shape']:9} {record['impl']:16} {record['method']:11} {record['isa']:11}"
        f" {record['adapter_case']:8} {record['tokens']:6} {record['ms']:9.3f} {record['weight_gbs']:7.1f}"
        f" {record['gflops']:8.1f} {100 * of_limit(record):6.1f} % {record['rel_l2']:8.5f}"
        f"  {ratio:32} A/A {aa}{'  NOISY' if record['noisy'] else ''}"
    )


HEADER = (
    f"{'shape':9} {'impl':16} {'method':11} {'isa':11} {'adapters':8} {'tokens':>6} {'ms':>9} {'GB/s':>7}"
    f" {'GFLOP/s':>8} {'ideal':>8} {'rel. L2':>8}  time over …, median (quartiles of rounds)"
)
