"""From how many tokens on a layer's experts are faster on the GPU: both ways are timed at several sizes, and so is the
time between two layers, in which experts can be copied while kt_kernels waits.

Shapes: T tokens, K top-k, H hidden size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch

import kt_kernels
from kt_sglang.moe.layers import CpuExperts
from kt_sglang.moe.transfer import HostBatch
from kt_sglang.prompts.streamed import LayerSource
from kt_sglang.prompts.unpacking import padded

MEASURED_TOKENS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
CLEARLY = 1.5
"""No larger batch is measured once the GPU is faster by this factor at two sizes in a row: one may be a hiccup."""
STEP = 32
"""The threshold is rounded up to a multiple of this, if a batch can have as many tokens."""

Times = tuple[int, float, float]
"""Tokens, and milliseconds of a layer in kt_kernels and on the GPU."""


@dataclass
class Between:
    """The time from one layer's experts to the next layer's, in small batches on the CPU path: at least so long,
    experts can be copied to the GPU undisturbed while kt_kernels is idle."""

    _times: list[float] = field(default_factory=list)
    _ended: tuple[LayerSource | None, float] = (None, 0.0)

    def begin(self, layer: int) -> None:
        source, at = self._ended
        if source is None or source.is_last or source.following is None:
            return
        if source.following.layer == layer:
            self._times.append(time.perf_counter() - at)

    def end(self, source: LayerSource | None) -> None:
        self._ended = source, time.perf_counter()

    @property
    def ms(self) -> float:
        """The median: the first layers of a process take longer."""
        return round(statistics.median(self._times) * 1e3, 3) if self._times else 0.0


def measure(
    weights: CpuExperts,
    hidden: int,
    device: torch.device,
    streamed: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any],
    wait: Callable[[], None],
    largest: int = MEASURED_TOKENS[-1],
) -> list[Times]:
    """Both ways with random inputs to one layer, by size. streamed: the GPU's way; wait: until the GPU has finished;
    largest: no batch has more tokens."""

    def times(tokens: int) -> Times:
        batch = random_batch(tokens, weights, hidden, device)
        cpu_ms = _median_ms(partial(_on_cpu, weights.moe, *batch), wait)
        gpu_ms = _median_ms(partial(streamed, *batch), wait)
        return tokens, round(cpu_ms, 3), round(gpu_ms, 3)

    found: list[Times] = []
    for tokens in sorted({min(size, largest) for size in MEASURED_TOKENS}):
        found.append(times(tokens))
        if len(found) > 1 and any(less > more for less, more in zip(found[-2][1:], found[-1][1:], strict=True)):
            _, *again = times(found[-2][0])  # something else took the time
            cpu_ms, gpu_ms = map(min, found[-2][1:], again)
            found[-2] = found[-2][0], cpu_ms, gpu_ms
        if len(found) > 1 and all(gpu_ms * CLEARLY < cpu_ms for _, cpu_ms, gpu_ms in found[-2:]):
            break
    return found


def crossing(measured: Sequence[Times]) -> int | None:
    """Tokens from which on the second time is below the first, linearly interpolated between measurements; None if it
    is not at the largest size."""
    if not measured or measured[-1][2] > measured[-1][1]:
        return None
    measured = _without_hiccups(measured)
    at = len(measured) - 1
    while at and measured[at - 1][2] <= measured[at - 1][1]:
        at -= 1
    if at == 0:
        return measured[0][0]
    (less, cpu_less, gpu_less), (more, cpu_more, gpu_more) = measured[at - 1 : at + 1]
    behind, ahead = gpu_less - cpu_less, cpu_more - gpu_more
    return min(padded(less + int((more - less) * behind / (behind + ahead)) + 1, STEP), more)


def _without_hiccups(measured: Sequence[Times]) -> list[Times]:
    """A batch never takes longer than a larger one: where it was measured so, something else took the time."""
    cpu_ms, gpu_ms = (list(accumulate((each[way] for each in reversed(measured)), min))[::-1] for way in (1, 2))
    return list(zip([tokens for tokens, _, _ in measured], cpu_ms, gpu_ms, strict=True))


def random_batch(tokens: int, weights: CpuExperts, hidden: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """As the router of a layer with all experts chooses: those that are resident are neither way's, so that a layer
    with many of them has little for the CPU."""
    dice = torch.Generator("cpu").manual_seed(tokens)
    experts, top_k = weights.placement.num_experts, min(weights.top_k, weights.placement.num_experts)
    chosen = torch.rand(tokens, experts, generator=dice, device="cpu").argsort(dim=1)[:, :top_k].int()
    ids = weights.placement.cpu_ids(chosen)
    x = torch.randn(tokens, hidden, generator=dice, device="cpu").bfloat16()
    return x.to(device), ids.to(device), torch.full((tokens, top_k), 1 / top_k, device=device)


def _on_cpu(moe: kt_kernels.MoE, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
    batch = HostBatch.gather(x_TH, ids_TK, weights_TK, None)
    out_TH = torch.empty_like(batch.x_TH)
    moe.forward(batch.x_TH, batch.ids_TK, batch.weights_TK, None, out_TH)
    batch.give_back(out_TH)


def _median_ms(work: Callable[[], Any], wait: Callable[[], None]) -> float:
    """Median of three, after a warm-up."""
    times = []
    for _ in range(4):
        began = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]) * 1e3
