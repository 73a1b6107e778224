"""What a table of shapes does not show: thread counts, a competing process, overhead of a call, memory over many
forwards, and where a forward's time goes. Each function measures one and returns what it found."""

import signal
import statistics
import subprocess
import sys
import time
from typing import Any

import host
import torch
from cases import SHAPES, AdapterCase, Batch, Shape, Weights, make_batches
from contenders import Contender, Ours
from rounds import ratio_of, run_rounds

NONE = AdapterCase("none")
TINY = Shape("tiny", 64, 32, 8, 2, 8)


def thread_counts(most: int) -> list[int]:
    counts = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return sorted({*counts, max(1, most - 1), most})


Rows = list[dict[str, Any]]


def some_experts(shape: Shape) -> Weights:
    """Enough to stream from memory, few enough to pack quickly."""
    return Weights(shape.with_experts(min(shape.experts, 32)), distinct=8)


def scaling(shape: Shape, methods: list[str], isa: str, threads: int, token_counts: list[int], budget_s: float) -> Rows:
    """Speed of each thread count over that of one thread, in turns."""
    weights = some_experts(shape)
    found = []
    for method in methods:
        runners: list[Contender] = [Ours(weights, method, isa, count, 1, 1) for count in thread_counts(threads)]
        for tokens in token_counts:
            timings = run_rounds(runners, make_batches(weights.shape, tokens, NONE), budget_s)
            for runner, timing in zip(runners, timings, strict=True):
                row = {"method": method, "tokens": tokens, "threads": runner.threads, "ms": timing.median_ms}
                found.append({**row, "speedup": vars(ratio_of(timings[0], timing))})
    return found


class BusyProcess:
    """A process that keeps one core busy, stopped until asked for."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        self.stop()

    def go(self) -> None:
        self._process.send_signal(signal.SIGCONT)
        time.sleep(0.02)  # until the scheduler has given it a core

    def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Beside:
    """A contender while the busy process runs."""

    def __init__(self, contender: Contender, busy: BusyProcess) -> None:
        self._contender, self._busy = contender, busy
        self.impl, self.isa, self.method = contender.impl, contender.isa, contender.method
        self.threads, self.layers = contender.threads, contender.layers
        self.expert_bytes, self.settle_s = contender.expert_bytes, contender.settle_s

    def seconds(self, batch: Batch, number: int) -> float:
        self._busy.go()
        try:
            return self._contender.seconds(batch, number)
        finally:
            self._busy.stop()

    def result(self, batch: Batch, number: int) -> torch.Tensor:
        return self._contender.result(batch, number)

    def close(self) -> None: ...


def competing(contenders: list[Contender], shape: Shape, token_counts: list[int], budget_s: float) -> Rows:
    """Each contender's time with one busy thread on the machine over its time without."""
    busy, found = BusyProcess(), []
    try:
        for tokens in token_counts:
            for contender in contenders:
                pair = [contender, Beside(contender, busy)]
                alone, beside = run_rounds(pair, make_batches(shape, tokens, NONE), budget_s)
                row = {"impl": contender.impl, "method": contender.method, "tokens": tokens}
                row |= {"threads": contender.threads, "ms": beside.median_ms, "alone_ms": alone.median_ms}
                found.append({**row, "slowdown": vars(ratio_of(beside, alone))})
    finally:
        busy.close()
    return found


def overhead(methods: list[str], isa: str, threads: int, calls: int = 3000) -> Rows:
    """Microseconds of a forward that has next to nothing to compute, back to back and after a pause that lets the
    threads sleep."""
    found = []
    for method in methods:
        ours = Ours(Weights(TINY), method, isa, threads, 1, 1)
        batch = make_batches(TINY, 1, NONE)[0]
        ours.seconds(batch, 0)
        busy = sorted(ours.seconds(batch, 0) for _ in range(calls))
        rested = []
        for _ in range(100):
            time.sleep(0.002)
            rested.append(ours.seconds(batch, 0))
        after_pause_us = statistics.median(rested) * 1e6
        row = {"method": method, "threads": threads, "median_us": statistics.median(busy) * 1e6}
        found.append({**row, "p99_us": busy[int(calls * 0.99)] * 1e6, "after_pause_us": after_pause_us})
    return found


def soak(methods: list[str], isa: str, threads: int, forwards: int) -> Rows:
    """Growth of resident memory over many forwards of changing size, after a first tenth that may fill buffers."""
    shape, found = SHAPES["small"], []
    for method in methods:
        ours = Ours(Weights(shape), method, isa, threads, 1, 1)
        batches = [batch for tokens in (1, 2, 7, 16) for batch in make_batches(shape, tokens, NONE)]
        outs = [torch.empty_like(batch.x) for batch in batches]
        first = 0
        for number in range(forwards):
            if number == forwards // 10:
                first = host.resident_bytes()
            ours.call(batches[number % len(batches)], outs[number % len(batches)], with_slots=False)
        growth = host.resident_bytes() - first
        row = {"method": method, "forwards": forwards, "growth_bytes": growth}
        found.append({**row, "bytes_per_forward": growth / max(1, forwards)})
    return found


def phases(shape: Shape, methods: list[str], isa: str, threads: int, token_counts: list[int]) -> Rows:
    """The share of each phase, as the kernels count it themselves."""
    found = []
    weights = some_experts(shape)
    for method in methods:
        ours = Ours(weights, method, isa, threads, 1, 1)
        for tokens in token_counts:
            batches = make_batches(weights.shape, tokens, NONE)
            ours.seconds(batches[0], 0)
            ours.moes[0].set_profiling(True)
            for number in range(8):
                ours.seconds(batches[number % len(batches)], number % len(batches))
            counts = ours.moes[0].read_profile() or {}
            ours.moes[0].set_profiling(False)
            total = sum(count["ns"] for count in counts.values()) or 1
            shares = {name: round(count["ns"] / total, 4) for name, count in counts.items()}
            found.append({"method": method, "tokens": tokens, "threads": threads, "shares": shares})
    return found
