"""How expert weights reach kt_kernels: SGLang's loader reads each tensor of the checkpoint once and passes it here, and
an expert is packed as soon as its three projections have arrived.

A quantized method's experts come from their own folder instead (quantized.py), and those packed by an earlier start
from the packed cache (packed.py); the checkpoint's are then skipped.

Not here: reading checkpoint files (SGLang does), packing (kt_kernels does).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

import kt_kernels
from kt_model.errors import LaunchError
from kt_model.weights.packed import CacheKey, Part
from kt_sglang.checkpoint import packed
from kt_sglang.checkpoint.quantized import intermediate_size, is_quantized, read_layer
from kt_sglang.checkpoint.unwritten_weights import finite_meanwhile
from kt_sglang.decode.captured import BETWEEN_LAYERS_US
from kt_sglang.moe.across_ranks import only_residents, part_of
from kt_sglang.moe.layers import LAYERS
from kt_sglang.moe.placement import Placement, name_of
from kt_sglang.process import start_progress

# SGLang's names of the three projections of an expert, in every family: w1 = gate, w3 = up, w2 = down.
PROJECTIONS = ("w1", "w3", "w2")


@cache
def thread_pool(threads: int, nodes: int) -> kt_kernels.ThreadPool:
    """The single pool of this process, shared by all layers."""
    return kt_kernels.ThreadPool(threads, nodes=nodes)


class ExpertWeights:
    """The CPU experts of one layer: collects projections, packs experts, tracks what is missing."""

    def __init__(self, kt_config: Any, layer: torch.nn.Module, placement: Placement, hidden_size: int) -> None:
        self.layer_id: int = kt_config.layer_idx
        self.weight_path: str = kt_config.weight_path
        self.placement = placement
        self.numbers = {expert: number for number, expert in enumerate(placement.on_cpu)}
        """Expert of the checkpoint → its number in kt_kernels."""
        self._kt_config = kt_config
        self._hidden_size = hidden_size
        self.top_k = int(getattr(layer, "top_k", None) or 1)
        part = part_of(layer)
        assert part is not None, f"layer {self.layer_id}: the CPU experts are those of the first rank"
        self.tp_rank, self.tp_size = part
        self.is_part = self.tp_size > 1 or bool(placement.resident and layer.moe_tp_size > 1)
        """Whether the layer's output is one rank's part of a sum."""
        self._moe: kt_kernels.MoE | None = None
        self._waiting: dict[int, dict[str, torch.Tensor]] = {}
        self._loaded: set[int] = set()
        start_progress.EXPERTS.expect(len(self.numbers))
        self._lock = threading.Lock()  # SGLang may load a checkpoint from several threads
        self.mapped = self._map()
        self.from_elsewhere = self.mapped or is_quantized(kt_config.method)
        self.is_complete = False
        LAYERS.weights[self.layer_id] = self

    @property
    def cache_key(self) -> CacheKey:
        """Identifies this process's experts in the packed cache."""
        config = self._kt_config
        pool = thread_pool(config.cpuinfer_threads, config.threadpool_count)
        layout = kt_kernels.packed_layout(method=config.method, pool=pool)
        part = (name_of(len(self.placement.resident), self.placement.num_experts), self.tp_rank, self.tp_size)
        return CacheKey(Path(self.weight_path), config.method, layout, *part)

    def _map(self) -> bool:
        """Load the layer from the packed cache, if it is there."""
        entry = packed.entry_of(self.cache_key)
        if entry is None or self.layer_id not in entry.layers:
            return False
        try:
            self._moe = self._create(entry.intermediate_size(self.layer_id), entry.map_layer(self.layer_id))
        except (LaunchError, OSError, ValueError) as failure:
            packed.refuse(self.cache_key, self.layer_id, failure)
            return False
        self._add(*self.numbers)
        return True

    @property
    def moe(self) -> kt_kernels.MoE:
        """The kernel object; exists once the first expert has arrived."""
        assert self._moe is not None, f"layer {self.layer_id}: no expert has been loaded"
        return self._moe

    def expect_replays(self) -> None:
        """Graphs will call this layer: the time between two layers is too short to sleep and wake up."""
        thread_pool(self._kt_config.cpuinfer_threads, self._kt_config.threadpool_count).stay_awake(BETWEEN_LAYERS_US)

    def loader(self, resident_loader: Callable[..., Any]) -> Callable[..., Any]:
        """A weight loader that keeps CPU experts and passes resident ones, by their numbers, to SGLang's own loader."""
        load_resident = only_residents(self.placement, resident_loader)

        def load(
            param: Any, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int, **extra: Any
        ) -> Any:
            if expert_id in self.numbers:
                return self._receive(expert_id, shard_id, loaded_weight)
            return load_resident(param, loaded_weight, weight_name, shard_id, expert_id, **extra)

        return load

    def require_complete(self) -> None:
        """Raise RuntimeError naming the experts missing from the checkpoint."""
        if is_quantized(self._kt_config.method) and not self._loaded:
            self._load_quantized()
        missing = sorted({*self.numbers} - self._loaded)
        if missing:
            raise RuntimeError(
                f"layer {self.layer_id}: {len(missing)} of {len(self.numbers)} CPU experts were not loaded from "
                f"{self.weight_path} (first missing: expert {missing[0]}); the checkpoint is incomplete"
            )
        self.is_complete = True

    def _load_quantized(self) -> None:
        """Pack this layer's experts from the folder of quantized experts."""
        config, experts = self._kt_config, self.placement.on_cpu
        layer = read_layer(self.weight_path, config.method, self.layer_id, experts, self.tp_rank, self.tp_size)
        for expert, arrays in layer:
            if self._moe is None:
                self._moe = self._create(intermediate_size(arrays))
            self._moe.load_quantized_expert(self.numbers[expert], arrays)
            self._add(expert)

    def _add(self, *experts: int) -> None:
        """Count loaded experts."""
        self._loaded.update(experts)
        start_progress.EXPERTS.add(len(experts), self.tp_rank)

    def _receive(self, expert: int, projection: str, weight: torch.Tensor) -> None:
        if self.from_elsewhere:
            return
        with self._lock:
            parts = self._waiting.setdefault(expert, {})
            parts[projection] = self._cut(projection, weight)
            if len(parts) < len(PROJECTIONS):
                return
            gate, up, down = self._take(expert)
            if self._moe is None:
                self._moe = self._create(gate.shape[0])
            finite = finite_meanwhile([gate, up, down])
            self._moe.load_expert(self.numbers[expert], gate, up, down)
            if not finite():
                problem = f"{self.weight_path} is broken: NaN or infinity in expert {expert} of layer {self.layer_id}"
                raise LaunchError("model.path", problem, "Download its file again.")
            self._add(expert)

    def _take(self, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        parts = self._waiting.pop(expert)
        gate, up, down = (parts[p].to(torch.bfloat16).contiguous() for p in PROJECTIONS)
        return gate, up, down

    def _cut(self, projection: str, weight: torch.Tensor) -> torch.Tensor:
        """This tensor-parallel rank's part of the intermediate dimension: rows of gate and up, columns of down."""
        if self.tp_size == 1:
            return weight
        return weight.chunk(self.tp_size, dim=1 if projection == "w2" else 0)[self.tp_rank]

    def _create(self, intermediate_size: int, parts: Sequence[Part] | None = None) -> kt_kernels.MoE:
        config = self._kt_config
        return kt_kernels.MoE(
            num_experts=len(self.numbers),
            hidden_size=self._hidden_size,
            intermediate_size=intermediate_size,
            method=config.method,
            pool=thread_pool(config.cpuinfer_threads, config.threadpool_count),
            packed=parts,
        )
