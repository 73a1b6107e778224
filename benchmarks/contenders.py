"""Ours and torch's ways to compute a layer, all behind one face: several layers of the same weights, called in turn.

kt-kernel, which runs in a process of its own, is in peer.py.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from cases import ADAPTER_SCALE, AdapterCase, Batch, Lora, Need, Shape, Weights, add_lora, make_lora, routed_rows
from peaks import Peaks, ReadRate

import kt_kernels

METHODS = ("AMXBF16_SFT", "AMXINT8_SFT", "AMXINT4_SFT")
# Relative L2 against float32 above which a result counts as wrong and is not timed. The INT4 limit lets kt-kernel's
# per-row scales (26 to 28 %) through; what is asked of ours is in docs/performance.md.
WRONG_ABOVE = {"AMXBF16_SFT": 0.02, "AMXINT8_SFT": 0.06, "AMXINT4_SFT": 0.35}
_NOMINAL_BITS = {"AMXBF16_SFT": 16.0, "AMXINT8_SFT": 8.0, "AMXINT4_SFT": 4.5}


class Contender(Protocol):
    """An implementation with its layers loaded. Each call takes the next layer."""

    impl: str
    isa: str
    method: str
    threads: int
    expert_bytes: float  # of one expert's weights as the implementation must read them, without padding
    settle_s: float  # how long its idle threads go on spinning after a call

    @property
    def layers(self) -> int: ...
    def seconds(self, batch: Batch, number: int) -> float:
        """Time of one call; `number` is the batch's place in the case's list."""

    def result(self, batch: Batch, number: int) -> torch.Tensor: ...
    def close(self) -> None: ...


def buildable_methods(threads: int = 1, isa: str = "auto") -> list[str]:
    pool, found = kt_kernels.ThreadPool(threads), []
    for method in METHODS:
        try:
            kt_kernels.MoE(num_experts=2, hidden_size=64, intermediate_size=64, method=method, isa=isa, pool=pool)
        except (ValueError, NotImplementedError):
            continue
        found.append(method)
    return found


class Ours:
    impl = "kt_kernels"
    settle_s = 0.0

    def __init__(self, weights: Weights, method: str, isa: str, threads: int, nodes: int, layers: int) -> None:
        self.method, self.threads, self.shape = method, threads, weights.shape
        self.pool = kt_kernels.ThreadPool(threads, nodes=nodes)
        self.moes: list[kt_kernels.MoE] = []
        self._next = 0
        self._use_slots = False
        self._isa = isa
        self._arrays: list[dict[str, Any]] = []
        if method != "AMXBF16_SFT":
            self._quantize(weights)
        self.load_s = 0.0
        for _ in range(layers):
            self.add_layer(weights)
        self.isa = self.moes[0].isa
        nominal = self.shape.expert_weights * _NOMINAL_BITS[method] / 8
        self.expert_bytes = min(self.moes[0].packed_bytes / self.shape.experts, nominal)

    @property
    def layers(self) -> int:
        return len(self.moes)

    def add_layer(self, weights: Weights) -> None:
        shape = self.shape
        moe = kt_kernels.MoE(
            num_experts=shape.experts,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            method=self.method,
            isa=self._isa,
            pool=self.pool,
        )
        start = time.perf_counter()
        for expert in range(shape.experts):
            if self.method == "AMXBF16_SFT":
                moe.load_expert(expert, *weights.expert(expert))
            else:
                moe.load_quantized_expert(expert, self._arrays[expert % weights.distinct])
        self.load_s = time.perf_counter() - start
        self.moes.append(moe)

    def _quantize(self, weights: Weights) -> None:
        """Once for all layers: the search for INT4 scales takes longer than all the packing."""
        with ThreadPoolExecutor(self.threads) as threads:
            arrays = [
                threads.submit(kt_kernels.quantize_expert, *weights.expert(expert), self.method)
                for expert in range(weights.distinct)
            ]
        self._arrays = [array.result() for array in arrays]

    def all_loaded(self) -> None:
        self._arrays.clear()

    def set_adapters(self, loras: list[Lora]) -> None:
        """Each layer gets adapters in memory of its own, as a model has them."""
        for moe in self.moes:
            for slot, lora in enumerate(loras):
                moe.set_adapter(slot, kt_kernels.Adapter(*lora.factors, scale=ADAPTER_SCALE))
        self._use_slots = bool(loras)

    def clear_adapters(self, count: int) -> None:
        for moe in self.moes:
            for slot in range(count):
                moe.set_adapter(slot, None)
        self._use_slots = False

    def call(self, batch: Batch, out: torch.Tensor, with_slots: bool) -> float:
        moe = self.moes[self._next % len(self.moes)]
        self._next += 1
        slots = batch.slots if with_slots else None
        start = time.perf_counter()
        moe.forward(batch.x, batch.ids, batch.weights, slots, out)
        return time.perf_counter() - start

    def seconds(self, batch: Batch, number: int) -> float:
        return self.call(batch, torch.empty_like(batch.x), self._use_slots)

    def result(self, batch: Batch, number: int) -> torch.Tensor:
        out = torch.empty_like(batch.x)
        self.call(batch, out, self._use_slots)
        return out

    def close(self) -> None:
        self.moes.clear()


class OursAs:
    """The same layers once more under another name: as A/A pair, or without the adapters that the other one uses."""

    def __init__(self, ours: Ours, impl: str, *, adapters: bool) -> None:
        self._ours, self.impl, self._adapters = ours, impl, adapters
        self.isa, self.method, self.threads, self.settle_s = ours.isa, ours.method, ours.threads, ours.settle_s
        self.layers, self.expert_bytes = ours.layers, ours.expert_bytes

    def seconds(self, batch: Batch, number: int) -> float:
        return self._ours.call(batch, torch.empty_like(batch.x), self._adapters)

    def result(self, batch: Batch, number: int) -> torch.Tensor:
        out = torch.empty_like(batch.x)
        self._ours.call(batch, out, self._adapters)
        return out

    def close(self) -> None: ...


class Limit:
    """What the machine allows at the moment, as if it were an implementation: reads the memory for a while and answers
    how long ours would take at that rate, or at the peak of its arithmetic where that is longer."""

    impl = "limit"
    settle_s = 0.0

    def __init__(self, ours: Ours, rate: ReadRate, peaks: Peaks, needs: list[Need]) -> None:
        self.isa, self.method, self.threads = ours.isa, ours.method, ours.threads
        self.layers, self.expert_bytes = ours.layers, ours.expert_bytes
        self._rate, self._needs, self._gops = rate, needs, peaks.gops(ours.method, ours.isa)

    def seconds(self, batch: Batch, number: int) -> float:
        need = self._needs[number]
        size = need.experts * self.expert_bytes + need.lora_bytes
        operations = need.base_operations + need.lora_operations
        return max(size / self._rate.gbs(), operations / self._gops) / 1e9

    def result(self, batch: Batch, number: int) -> torch.Tensor:
        raise NotImplementedError("a limit computes nothing")

    def close(self) -> None: ...


class TorchLayers:
    """bf16 weights that torch's contenders share, with one counter, so that neither finds the other's in cache."""

    def __init__(self, weights: Weights, layers: int) -> None:
        self.layers = [weights.stacked() for _ in range(layers)]
        self._next = 0
        self.loras: list[Lora] = []

    def next(self) -> list[torch.Tensor]:
        self._next += 1
        return self.layers[self._next % len(self.layers)]


class TorchContender:
    impl = "torch"
    isa = "torch"
    method = "AMXBF16_SFT"
    settle_s = 0.02  # OpenMP's threads spin that long

    def __init__(self, weights: TorchLayers, shape: Shape, threads: int) -> None:
        torch.set_num_threads(threads)
        self.weights, self.shape, self.threads = weights, shape, threads
        self.layers = len(weights.layers)
        self.expert_bytes = 2.0 * shape.expert_weights

    def seconds(self, batch: Batch, number: int) -> float:
        layer = self.weights.next()
        start = time.perf_counter()
        self.forward(layer, batch)
        return time.perf_counter() - start

    def result(self, batch: Batch, number: int) -> torch.Tensor:
        return self.forward(self.weights.next(), batch)

    def forward(self, layer: list[torch.Tensor], batch: Batch) -> torch.Tensor:
        raise NotImplementedError

    def close(self) -> None: ...


class TorchLoop(TorchContender):
    """One F.linear an expert and projection, as transformers and PEFT do it."""

    impl = "torch_loop"

    def forward(self, layer: list[torch.Tensor], batch: Batch) -> torch.Tensor:
        gate, up, down = layer
        loras = self.weights.loras
        out = torch.zeros(batch.x.shape, dtype=torch.float32)
        for expert, token, choice in routed_rows(batch):
            x = batch.x[token]
            slots = batch.slots[token] if loras and batch.slots is not None else None
            g, u = F.linear(x, gate[expert]), F.linear(x, up[expert])
            add_lora(g, x, 0, expert, loras, slots)
            add_lora(u, x, 1, expert, loras, slots)
            h = F.silu(g) * u
            y = F.linear(h, down[expert])
            add_lora(y, h, 2, expert, loras, slots)
            out.index_add_(0, token, y.float() * batch.weights[token, choice, None])
        return out.bfloat16()


class TorchGrouped(TorchContender):
    """Rows sorted by expert, then torch._grouped_mm over all of them; without adapters."""

    impl = "torch_grouped_mm"

    def forward(self, layer: list[torch.Tensor], batch: Batch) -> torch.Tensor:
        gate, up, down = (stack.transpose(-2, -1) for stack in layer)
        order = batch.ids.flatten().argsort()
        token = order // batch.ids.shape[1]
        ends = batch.ids.flatten().bincount(minlength=self.shape.experts).cumsum(0).to(torch.int32)
        x = batch.x[token]
        h = F.silu(torch._grouped_mm(x, gate, offs=ends)) * torch._grouped_mm(x, up, offs=ends)
        y = torch._grouped_mm(h, down, offs=ends).float() * batch.weights.flatten()[order, None]
        return torch.zeros(batch.x.shape, dtype=torch.float32).index_add_(0, token, y).bfloat16()


def loras_of(shape: Shape, adapters: AdapterCase) -> list[Lora]:
    return [make_lora(shape, rank, slot) for slot, rank in enumerate(adapters.ranks)]
