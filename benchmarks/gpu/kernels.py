"""The limit of a decode step: DeepSeek-V2-Lite's expert layers alone, called one after the other, and in a CUDA graph
as the plugin captures them, by its mailbox and by host functions of the driver; new routing in each step.

kernels.py METHOD LAYERS [THREADS]
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

import kt_kernels
from kt_sglang.captured import ALL_ROWS, BETWEEN_LAYERS_US, CapturedSteps, wait_for
from kt_sglang.handover import Handover, HostFunctions, launch_host_function, on_cuda

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


class Captured(NamedTuple):
    steps: CapturedSteps
    graph: torch.cuda.CUDAGraph
    outs: list[torch.Tensor]


class Step:
    """One batch size: the same layers directly and in graphs."""

    def __init__(self, layers: list[kt_kernels.MoE], tokens: int) -> None:
        self.layers = layers
        self.x = torch.randn(tokens, H, device="cuda", dtype=torch.bfloat16)
        self.host_x, self.host_out = self.x.cpu(), torch.empty(tokens, H, dtype=torch.bfloat16)
        self.ids = [torch.zeros(tokens, K, dtype=torch.int32, device="cuda") for _ in layers]
        self.host_ids = [ids.cpu() for ids in self.ids]
        self.weights = torch.full((tokens, K), 1 / K, device="cuda")
        self.host_weights = self.weights.cpu()
        self.record = kt_kernels.HostRecord()
        ways = {"captured": on_cuda(), "host_function": HostFunctions(launch_host_function)}
        self.graphs = {name: self.capture(way) for name, way in ways.items()}

    def capture(self, way: Handover) -> Captured:
        steps = CapturedSteps(way)
        steps.prepare(len(self.x), K, H)
        made = Captured(steps, torch.cuda.CUDAGraph(), [])
        with torch.cuda.graph(made.graph):
            for moe, ids in zip(self.layers, self.ids, strict=True):
                made.outs.append(steps.run(moe, self.record, self.x, ids, self.weights, None))
        return made

    def route(self) -> None:
        for ids, host_ids in zip(self.ids, self.host_ids, strict=True):
            host_ids.copy_(torch.rand(len(host_ids), E).argsort()[:, :K])
            ids.copy_(host_ids)

    def direct(self) -> None:
        for moe, ids in zip(self.layers, self.host_ids, strict=True):
            moe.forward(self.host_x, ids, self.host_weights, None, self.host_out)

    def replay(self, name: str) -> None:
        self.graphs[name].steps.set_real_rows(ALL_ROWS, "cuda")
        self.graphs[name].graph.replay()
        wait_for(None)

    def is_right(self) -> bool:
        """Whether the last layer gives to the bit what it gave directly."""
        given = [graph.outs[-1].cpu() for graph in self.graphs.values()]
        return all(torch.equal(out, self.host_out) for out in given) and self.record.failure is None


def timed_ms(step: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    return (time.perf_counter() - began) * 1e3


def times_ms(step: Step) -> dict[str, float]:
    step.route()
    found = {"direct": timed_ms(step.direct)}
    return found | {name: timed_ms(partial(step.replay, name)) for name in step.graphs}


def main() -> None:
    method, number = sys.argv[1], int(sys.argv[2])
    pool = kt_kernels.ThreadPool(int(sys.argv[3]) if sys.argv[3:] else len(os.sched_getaffinity(0)))
    pool.stay_awake(BETWEEN_LAYERS_US)
    layers = build(method, number, pool)
    for tokens in BATCHES:
        step = Step(layers, tokens)
        times = [times_ms(step) for _ in range(ROUNDS)][WARM:]
        medians = {f"{name}_ms": round(statistics.median(each[name] for each in times), 2) for name in times[0]}
        row = {"method": method, "layers": number, "batch": tokens, **medians, "same_to_the_bit": step.is_right()}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
