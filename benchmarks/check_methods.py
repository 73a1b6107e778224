"""Checks every method on every instruction set of this machine against float64: python benchmarks/check_methods.py.

For a machine without the test suite's dependencies; needs torch only. Also holds each instruction set against the
portable reference, which quantizes alike and so must agree far more closely than the quantization errs.
"""

import argparse
import itertools
import sys
from dataclasses import dataclass

import torch
from cases import AdapterCase, Batch, Shape, Weights, make_batch, reference, relative_l2
from contenders import METHODS, Ours, loras_of

import kt_kernels

# Whole layer, Gaussian weights, against float64 on the weights before quantization.
LIMITS = {"AMXBF16_SFT": 0.005, "AMXINT8_SFT": 0.035, "AMXINT4_SFT": 0.16}
# Of a small batch's result. Where bf16 is multiplied as bf16, an adapter's inner values are rounded on the way, and an
# int8 activation beside a rounding edge then moves by a step; int4 is widened to int8 where an expert has many rows.
AGAINST_REFERENCE = {"AMXBF16_SFT": 0.006, "AMXINT8_SFT": 0.012, "AMXINT4_SFT": 0.025}
SHAPES = [Shape("even", 256, 128, 8, 2, 8), Shape("odd", 200, 88, 5, 3, 5), Shape("1408 in pools", 256, 1408, 4, 2, 4)]
TOKENS = [*range(1, 18), 31, 64, 100]
CASES = [
    AdapterCase("none"),
    *(AdapterCase(f"1x{rank}", (rank,)) for rank in (1, 8, 16, 17, 64)),
    AdapterCase("mixed", (8, 1, 64, 16)),
    AdapterCase("idle", (8, 16), idle=True),
]


@dataclass
class Tally:
    checks: int = 0
    worst: float = 0.0
    failures: int = 0

    def count(self, what: str, error: float, limit: float) -> None:
        self.checks += 1
        self.worst = max(self.worst, error)
        if error <= limit:
            return
        self.failures += 1
        if self.failures <= 5:
            print(f"  WRONG {what}: relative L2 {error:.4g}, allowed {limit}", flush=True)


class Oracle:
    """Batches and their float64 results of one shape, made once for all methods, instruction sets and pools."""

    def __init__(self, shape: Shape) -> None:
        self.weights = Weights(shape)
        self.loras = {case.name: loras_of(shape, case) for case in CASES}
        self.expected: dict[tuple[str, int], tuple[Batch, torch.Tensor]] = {}

    def of(self, case: AdapterCase, tokens: int) -> tuple[Batch, torch.Tensor]:
        key = case.name, tokens
        if key not in self.expected:
            batch = make_batch(self.weights.shape, tokens, case, seed=tokens)
            self.expected[key] = batch, reference(self.weights, self.loras[case.name], batch, torch.float64)
        return self.expected[key]


def token_counts(case: AdapterCase) -> list[int]:
    return TOKENS if case.name in ("none", "mixed") else [1, 16, 33]


def check(method: str, isas: list[str], oracle: Oracle, nodes: int, tallies: dict[str, Tally]) -> None:
    """One shape, method and pool count on all instruction sets."""
    layers = {isa: Ours(oracle.weights, method, isa, max(nodes, 4), nodes, 1) for isa in {*isas, "reference"}}
    for case in CASES:
        for ours in layers.values():
            ours.set_adapters(oracle.loras[case.name])
        for tokens in token_counts(case):
            batch, expected = oracle.of(case, tokens)
            plain = layers["reference"].result(batch, 0)
            # The few elements of a small batch scatter more than a whole layer does.
            limit = LIMITS[method] * (1 if tokens >= 16 else 1.3)
            for isa in isas:
                what = (
                    f"{method} {isa}, {oracle.weights.shape.name}, {nodes} pools, adapters {case.name}, {tokens} tokens"
                )
                result = layers[isa].result(batch, 0)
                tallies[isa].count(what, relative_l2(result, expected), limit)
                tallies[isa].count(
                    what + " against the reference", relative_l2(result, plain), AGAINST_REFERENCE[method]
                )
        for ours in layers.values():
            ours.clear_adapters(case.count)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--isas", default=",".join(kt_kernels.isas()), help="default: all that this machine runs")
    isas = parser.parse_args().isas.split(",")
    torch.set_num_threads(1)
    oracles = [Oracle(shape) for shape in SHAPES]
    failures = 0
    for method in METHODS:
        tallies = {isa: Tally() for isa in isas}
        for oracle, nodes in itertools.product(oracles, (1, 2, 3)):
            try:
                check(method, isas, oracle, nodes, tallies)
            except Exception as failure:  # the others still count
                failures += 1
                print(f"{method}, {nodes} pools FAILED: {type(failure).__name__}: {failure}", flush=True)
        for isa, tally in tallies.items():
            failures += tally.failures
            verdict = f"{tally.failures} WRONG" if tally.failures else "right"
            print(
                f"{isa:12} {method:12} {tally.checks} checks, worst relative L2 {tally.worst:.4f}: {verdict}",
                flush=True,
            )
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
