"""The limit of a decode step: DeepSeek-V2-Lite's expert layers alone, called one after the other, and in a CUDA graph
as the plugin captures them, with threads that stay awake between two layers and with threads that do not; new routing
in each step.

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
from kt_sglang.captured import BETWEEN_LAYERS_US, CapturedSteps, launch_on_stream, wait_for

H, I, E, K = 2048, 1408, 64, 6  # noqa: E741
BATCHES = (1, 4, 16, 64)
ROUNDS, WARM = 14, 3


def build(method: str, layers: int, pool: kt_kernels.ThreadPool) -> list[kt_kernels.MoE]:
    made = []
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
        wait_for(None)


def timed_ms(step: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    return (time.perf_counter() - began) * 1e3


def times_ms(step: Step, pool: kt_kernels.ThreadPool) -> list[float]:
    """Direct, captured, captured with threads that fall asleep."""
    step.route()
    found = [timed_ms(step.direct), timed_ms(step.replay)]
    pool.stay_awake(0)
    found.append(timed_ms(step.replay))
    pool.stay_awake(BETWEEN_LAYERS_US)
    return found


def main() -> None:
    method, number = sys.argv[1], int(sys.argv[2])
    pool = kt_kernels.ThreadPool(int(sys.argv[3]) if sys.argv[3:] else len(os.sched_getaffinity(0)))
    layers = build(method, number, pool)
    for tokens in BATCHES:
        step = Step(layers, tokens)
        times = [times_ms(step, pool) for _ in range(ROUNDS)]
        medians = [round(statistics.median(one), 1) for one in zip(*times[WARM:], strict=True)]
        named = dict(zip(("direct_ms", "captured_ms", "captured_asleep_ms"), medians, strict=True))
        same = torch.equal(step.out.cpu(), step.host_out) and step.record.failure is None
        row = {"method": method, "layers": number, "batch": tokens, **named, "same_to_the_bit": same}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
