"""The two ways in which adapters of resident experts are added (kt_sglang/experts/resident_adapters.py): milliseconds
of a layer of DeepSeek-V2-Lite's shape with 16 of 64 experts resident and an adapter of rank 8, in turns. Needs a
GPU."""

from __future__ import annotations

import json
import statistics
import time

import torch

from kt_sglang.without_gpu import torchvision_shim

torchvision_shim.install_if_needed()

from kt_sglang.experts.resident_adapters import GatheredHooks, GroupedHooks, ResidentAdapters  # noqa: E402

H, I, EXPERTS, RESIDENT, K, RANK, SLOTS = 2048, 1408, 64, 16, 6, 8, 4  # noqa: E741
TOKENS = (32, 64, 128, 192, 256, 512, 1024, 2048, 8192)
ROUNDS, WARM = 9, 2
WAYS = {"gathered": GatheredHooks, "grouped": GroupedHooks}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


class Batch:
    """What SGLang's kernels pass to the hooks of one layer."""

    def __init__(self, tokens: int) -> None:
        ids = torch.rand(tokens, EXPERTS, device="cuda").argsort()[:, :K]
        self.ids = torch.where(ids < RESIDENT, ids, -1).int()
        self.slots = torch.arange(tokens, device="cuda", dtype=torch.int32) % SLOTS
        self.weights = torch.rand(tokens, K, device="cuda")
        self.x, self.inner = random(tokens, H), random(tokens * K, I)
        self.gate_up, self.down = random(tokens, K, 2 * I), random(tokens, K, H)

    def ms(self, way: str, pools: ResidentAdapters) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        hooks = WAYS[way](pools, self.slots)
        hooks.after_gate_up(self.x, self.gate_up, self.weights, self.ids)
        hooks.after_down(self.inner, self.down, self.weights, self.ids)
        torch.cuda.synchronize()
        return (time.perf_counter() - began) * 1e3


def main() -> None:
    pools = ResidentAdapters(SLOTS, RESIDENT, RANK, H, I, torch.device("cuda"))
    for pool in pools.pools:
        pool.normal_()
    pools.prepare()
    for tokens in TOKENS:
        batch = Batch(tokens)
        rounds = [{way: batch.ms(way, pools) for way in WAYS} for _ in range(ROUNDS)][WARM:]
        medians = {f"{way}_ms": round(statistics.median(each[way] for each in rounds), 3) for way in WAYS}
        print(json.dumps({"tokens": tokens, **medians}), flush=True)


if __name__ == "__main__":
    main()
