"""The limit of a decode step: DeepSeek-V2-Lite's expert layers alone, called one after the other, and in a CUDA graph
as the plugin captures them; new routing in each step.

kernels.py METHOD LAYERS [THREADS]
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch

import kt_kernels
from kt_sglang.captured import CapturedSteps, launch_on_stream

H, I, E, K = 2048, 1408, 64, 6  # noqa: E741
BATCHES = (1, 4, 16, 64)
ROUNDS, WARM = 14, 3


def build(method: str, layers: int, threads: int) -> list[kt_kernels.MoE]:
    pool, made = kt_kernels.ThreadPool(threads), []
    for _ in range(layers):
        moe = kt_kernels.MoE(num_experts=E, hidden_size=H, intermediate_size=I, method=method, pool=pool)
        shapes = ((E, I, H), (E, I, H), (E, H, I))
        stacked = [(torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02).cpu() for shape in shapes]
        for expert in range(E):
            moe.load_expert(expert, *(part[expert] for part in stacked))
        made.append(moe)
    return made


class Step:
    """One batch size: the same layers directly and in a graph."""

    def __init__(self, layers: list[kt_kernels.MoE], tokens: int) -> None:
        self.layers = layers
        self.x = torch.randn(tokens, H, device="cuda", dtype=torch.bfloat16)
        self.host_x, self.host_out = self.x.cpu(), torch.empty(tokens, H, dtype=torch.bfloat16)
        self.ids = [torch.zeros(tokens, K, dtype=torch.int32, device="cuda") for _ in layers]
        self.host_ids = [ids.cpu() for ids in self.ids]
        self.weights = torch.full((tokens, K), 1 / K, device="cuda")
        self.host_weights = self.weights.cpu()
        self.record, self.steps = kt_kernels.HostRecord(), CapturedSteps(launch_on_stream)
        self.steps.prepare(tokens, K, H)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for moe, ids in zip(layers, self.ids, strict=True):
                self.out = self.steps.run(moe, self.record, self.x, ids, self.weights, None)

    def route(self) -> None:
        for ids, host_ids in zip(self.ids, self.host_ids, strict=True):
            host_ids.copy_(torch.rand(len(host_ids), E).argsort()[:, :K])
            ids.copy_(host_ids)

    def direct(self) -> None:
        for moe, ids in zip(self.layers, self.host_ids, strict=True):
            moe.forward(self.host_x, ids, self.host_weights, None, self.host_out)

    def replay(self) -> None:
        self.graph.replay()
        torch.cuda.synchronize()


def timed_ms(step: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    return (time.perf_counter() - began) * 1e3


def main() -> None:
    method, layers = sys.argv[1], build(sys.argv[1], int(sys.argv[2]), int((sys.argv[3:] or [os.cpu_count()])[0] or 1))
    for tokens in BATCHES:
        step, times = Step(layers, tokens), []
        for _ in range(ROUNDS):
            step.route()
            times.append((timed_ms(step.direct), timed_ms(step.replay)))
        direct, captured = (round(statistics.median(one), 1) for one in zip(*times[WARM:], strict=True))
        same = torch.equal(step.out.cpu(), step.host_out) and step.record.failure is None
        row = {"method": method, "layers": len(layers), "batch": tokens, "direct_ms": direct, "captured_ms": captured}
        print(json.dumps(row | {"same_to_the_bit": same}), flush=True)


if __name__ == "__main__":
    main()
