"""The limit of a decode step: DeepSeek-V2-Lite's expert layers alone, called one after the other, and in a CUDA graph
as the plugin captures them, by its mailbox and by host functions of the driver; new routing in each step.

captured_layers.py METHOD LAYERS [THREADS]
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from expert_layers import BATCHES, H, K, build, pool_of, random_ids

import kt_kernels
from kt_sglang.decode.captured import ALL_ROWS, CapturedSteps, wait_for
from kt_sglang.decode.handover import Handover, HostFunctions, launch_host_function, on_cuda

ROUNDS, WARM = 14, 3


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
            host_ids.copy_(random_ids(len(host_ids)))
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
    layers = build(method, number, pool_of(int(sys.argv[3]) if sys.argv[3:] else None))
    for tokens in BATCHES:
        step = Step(layers, tokens)
        times = [times_ms(step) for _ in range(ROUNDS)][WARM:]
        medians = {f"{name}_ms": round(statistics.median(each[name] for each in times), 2) for name in times[0]}
        row = {"method": method, "layers": number, "batch": tokens, **medians, "same_to_the_bit": step.is_right()}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
