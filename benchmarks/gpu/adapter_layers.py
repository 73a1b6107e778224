"""What adapters cost the expert layers alone, of DeepSeek-V2-Lite's shape: base, one and four in a batch, in turns.

adapter_layers.py METHOD LAYERS [RANK [THREADS]]: JSON lines with milliseconds of a step, and the median of its ratios
to the base's step with the same routing. Needs no GPU.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch
from expert_layers import BATCHES, H, K, add_adapters, build, pool_of, random, random_ids

import kt_kernels

ADAPTERS = 4
ROUNDS, WARM = 12, 1


def step_ms(layers: list[kt_kernels.MoE], ids: list[torch.Tensor], slots: torch.Tensor | None) -> float:
    tokens = len(ids[0])
    x, out = random(tokens, H) * 50, torch.empty(tokens, H, dtype=torch.bfloat16)
    weights = torch.full((tokens, K), 1 / K)
    began = time.perf_counter()
    for moe, chosen in zip(layers, ids, strict=True):
        moe.forward(x, chosen, weights, slots, out)
    return (time.perf_counter() - began) * 1e3


def measure(layers: list[kt_kernels.MoE], tokens: int) -> dict[str, float]:
    kinds = {
        "base": None,
        "one": torch.zeros(tokens, dtype=torch.int32),
        "four": torch.arange(tokens, dtype=torch.int32) % ADAPTERS,
    }
    rounds = []
    for _ in range(ROUNDS):
        ids = [random_ids(tokens) for _ in layers]
        rounds.append({kind: step_ms(layers, ids, slots) for kind, slots in kinds.items()})
    kept = rounds[WARM:]
    found = {f"{kind}_ms": round(statistics.median(each[kind] for each in kept), 2) for kind in kinds}
    ratios = {kind: round(statistics.median(each[kind] / each["base"] for each in kept), 3) for kind in kinds}
    return found | {f"{kind}_over_base": ratio for kind, ratio in ratios.items() if kind != "base"}


def main() -> None:
    method, number, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if sys.argv[3:] else 8
    pool = pool_of(int(sys.argv[4]) if sys.argv[4:] else None)
    layers = build(method, number, pool)
    add_adapters(layers, ADAPTERS, rank)
    for tokens in BATCHES:
        row = {"method": method, "layers": number, "rank": rank, "threads": pool.threads, "tokens": tokens}
        print(json.dumps(row | measure(layers, tokens)), flush=True)


if __name__ == "__main__":
    main()
