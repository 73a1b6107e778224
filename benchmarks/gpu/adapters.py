"""What adapters cost the expert layers alone, of DeepSeek-V2-Lite's shape: base, one and four in a batch, in turns.

adapters.py METHOD LAYERS [RANK [THREADS]]: JSON lines with milliseconds of a step, and the median of its ratios to the
base's step with the same routing. Needs no GPU.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time

import torch

import kt_kernels

H, I, E, K = 2048, 1408, 64, 6  # noqa: E741
ADAPTERS = 4
BATCHES = (1, 4, 16, 64)
ROUNDS, WARM = 12, 1
AWAKE_US = 500
"""As between two layers of a captured step (kt_sglang/captured.py)."""


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16) * 0.02


def random_adapter(rank: int) -> kt_kernels.Adapter:
    into, out_of = (E, rank, H), (E, I, rank)
    return kt_kernels.Adapter(
        *(random(*shape) for shape in (into, out_of, into, out_of, (E, rank, I), (E, H, rank))), scale=1.0
    )


def build(method: str, layers: int, rank: int, pool: kt_kernels.ThreadPool) -> list[kt_kernels.MoE]:
    """All layers have the same content, each in memory of its own."""
    weights = [random(E, *shape) for shape in ((I, H), (I, H), (H, I))]
    made = []
    for _ in range(layers):
        moe = kt_kernels.MoE(num_experts=E, hidden_size=H, intermediate_size=I, method=method, pool=pool)
        for expert in range(E):
            moe.load_expert(expert, *(part[expert] for part in weights))
        for slot in range(ADAPTERS):
            moe.set_adapter(slot, random_adapter(rank))
        made.append(moe)
    return made


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
        ids = [torch.rand(tokens, E).argsort()[:, :K].int() for _ in layers]
        rounds.append({kind: step_ms(layers, ids, slots) for kind, slots in kinds.items()})
    kept = rounds[WARM:]
    found = {f"{kind}_ms": round(statistics.median(each[kind] for each in kept), 2) for kind in kinds}
    ratios = {kind: round(statistics.median(each[kind] / each["base"] for each in kept), 3) for kind in kinds}
    return found | {f"{kind}_over_base": ratio for kind, ratio in ratios.items() if kind != "base"}


def main() -> None:
    method, number, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if sys.argv[3:] else 8
    threads = int(sys.argv[4]) if sys.argv[4:] else len(os.sched_getaffinity(0))
    pool = kt_kernels.ThreadPool(threads)
    pool.stay_awake(AWAKE_US)
    layers = build(method, number, rank, pool)
    for tokens in BATCHES:
        row = {"method": method, "layers": number, "rank": rank, "threads": threads, "tokens": tokens}
        print(json.dumps(row | measure(layers, tokens)), flush=True)


if __name__ == "__main__":
    main()
