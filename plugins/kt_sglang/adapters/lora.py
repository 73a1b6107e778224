"""Expert adapters, per request: SGLang decides which adapter is in which slot of its pool and which slot each token
uses; here a slot is packed for kt_kernels when its content changes, which happens between two batches, and the batch's
slots are passed to the experts method. The pools are in host memory: kt_kernels packs from there.

Layout of SGLang's expert pools (B is already multiplied by the adapter's scale), S slots, R the pool's largest rank:
gate_up A (S, E, 2R, H) and gate_up B (S, E, 2I, R), gate rows first; down A (S, E, R, I); down B (S, E, H, R).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.lora.layers import BaseLayerWithLoRA
from sglang.srt.lora.layers import FusedMoEWithLoRA as StockFusedMoEWithLoRA
from sglang.srt.runtime_context import LoRABatchLayout
from torch.overrides import TorchFunctionMode

import kt_kernels
from kt_sglang.decode import captured
from kt_sglang.experts.method import KTEPWrapperMethod
from kt_sglang.moe.across_ranks import ExpertsOfRank0, part_of
from kt_sglang.moe.layers import LAYERS
from kt_sglang.moe.reference import Factors


class FusedMoEWithLoRA(StockFusedMoEWithLoRA):  # type: ignore[misc]
    """SGLang's wrapper of an MoE layer under LoRA, with the experts in kt_kernels instead of a GPU runner."""

    def __init__(self, base_layer: Any, lora_backend: Any, **options: Any) -> None:
        if not isinstance(base_layer.quant_method, KTEPWrapperMethod):
            raise TypeError(
                f"layer {base_layer.layer_id}: experts run in {type(base_layer.quant_method).__qualname__}, expected "
                "kt_sglang's KTEPWrapperMethod; --kt-weight-path is missing from the server's arguments"
            )
        BaseLayerWithLoRA.__init__(self, base_layer, lora_backend)
        lora_backend.is_moe_lora = True
        self.experts_method: KTEPWrapperMethod = base_layer.quant_method
        self.experts_method.record.lora = self
        self._packed_slots: set[int] = set()
        self._copy_what_sglang_reads(base_layer, options)

    def _copy_what_sglang_reads(self, base_layer: Any, options: dict[str, Any]) -> None:
        """Attributes that models and the LoRA manager expect on the wrapper."""
        self.experts_shared_outer_loras = options.get("experts_shared_outer_loras", False)
        self.lora_use_virtual_experts = False
        self.quant_method = base_layer.quant_method
        self.moe_runner_config = base_layer.moe_runner_config
        self.dispatcher = base_layer.dispatcher
        self.num_local_experts = base_layer.num_local_experts
        self.should_fuse_routed_scaling_factor_in_topk = base_layer.should_fuse_routed_scaling_factor_in_topk
        rank, size = part_of(base_layer) or (base_layer.moe_tp_rank, base_layer.moe_tp_size)
        self.tp_rank, self.tp_size = int(rank), int(size)  # SGLang splits the pools' contents by these
        self.intermediate_size_per_partition = base_layer.intermediate_size_per_partition
        self._uses_interleaved_gate_up = False
        # SGLang chooses the device of its own routing buffers for graphs by this layer's; the weights are not read.
        self._quant_info = SimpleNamespace(w13_weight=SimpleNamespace(device=self.lora_backend.device))

    def take_slots(self, ranks: Mapping[int, int]) -> None:
        """These slots of the pools (slot → rank, 0: empty) have new contents; no forward may be in flight."""
        self.experts_method.record.forget_slots(set(ranks))
        for slot, rank in ranks.items():
            if rank:
                self._pack(slot, rank)
            elif slot in self._packed_slots:
                self._drop(slot)

    def set_lora_info(self, *pools: torch.Tensor, **named: torch.Tensor) -> None:
        """Receives SGLang's pools, before any adapter and any graph; passes them to the resident experts."""
        super().set_lora_info(*pools, **named)
        resident, down_a = self.experts_method.resident, self.down_lora_a_weights
        if self.experts_method.num_gpu_experts and resident.adapters is None:
            resident.allocate_adapters(down_a.shape[0], down_a.shape[2], self.base_layer)

    def forward(self, hidden_states: torch.Tensor, topk_output: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's forward with this batch's adapters; (T, H) in, (T, H) out."""
        self.experts_method.adapter_slots_T = self._slots_of_batch()
        try:
            return self.base_layer.forward(hidden_states, topk_output, **kwargs)
        finally:
            self.experts_method.adapter_slots_T = None

    def _slots_of_batch(self) -> torch.Tensor | None:
        """One slot per token (-1: none), or None if no row of the batch has an adapter."""
        batch = self.lora_backend.get_batch_info(LoRABatchLayout.TP_GLOBAL)
        if batch is None or batch.moe_lora_info is None:
            return None
        slots_T: torch.Tensor = batch.moe_lora_info.token_lora_mapping
        if captured.is_capturing(slots_T):
            return slots_T  # one graph serves batches with and without adapters; SGLang fills this buffer for each
        if not batch.has_active_lora:
            return None
        return SLOTS.of(batch, slots_T, self.base_layer.layer_id)

    @property
    def packed_slots(self) -> int:
        """Number of adapters packed for the experts of this layer."""
        return len(self._packed_slots)

    @property
    def pools(self) -> tuple[torch.Tensor, ...]:
        """SGLang's pools on the host: gate_up A and B, down A and B."""
        return (
            self.gate_up_lora_a_weights,
            self.gate_up_lora_b_weights,
            self.down_lora_a_weights,
            self.down_lora_b_weights,
        )

    def factors(self, slot: int, expert: int) -> Factors:
        """One expert's factors in SGLang's pools, B scaled; unused ranks are zero."""
        return self._pools(slot, expert)

    def _pack(self, slot: int, rank: int) -> None:
        """Copy one slot of SGLang's pools into kt_kernels."""
        weights = self.experts_method.weights
        assert weights is not None
        placement, resident = weights.placement, self.experts_method.resident
        if placement.resident and resident.adapters:
            resident.adapters.fill(slot, self._as_residents(self._pools(slot, list(placement.resident))))
        self._packed_slots.add(slot)
        if isinstance(weights, ExpertsOfRank0):
            return
        gate_a, gate_b, up_a, up_b, down_a, down_b = self._pools(slot, list(placement.on_cpu))
        adapter = kt_kernels.Adapter(
            gate_a=gate_a[:, :rank].contiguous(),
            gate_b=gate_b[:, :, :rank].contiguous(),
            up_a=up_a[:, :rank].contiguous(),
            up_b=up_b[:, :, :rank].contiguous(),
            down_a=down_a[:, :rank].contiguous(),
            down_b=down_b[:, :, :rank].contiguous(),
        )
        weights.moe.set_adapter(slot, adapter)

    def _as_residents(self, factors: Factors) -> Factors:
        """Split as this rank's resident experts are; the first rank's pools hold whole experts."""
        if self.tp_size == self.base_layer.moe_tp_size:
            return factors
        gate_a, gate_b, up_a, up_b, down_a, down_b = factors
        inner = self.intermediate_size_per_partition
        return gate_a, gate_b[:, :inner], up_a, up_b[:, :inner], down_a[:, :, :inner], down_b

    def _drop(self, slot: int) -> None:
        weights = self.experts_method.weights
        assert weights is not None
        if not isinstance(weights, ExpertsOfRank0):
            weights.moe.set_adapter(slot, None)
        if self.experts_method.resident.adapters:
            self.experts_method.resident.adapters.empty(slot)
        self._packed_slots.discard(slot)

    def _pools(self, slot: int, experts: int | list[int]) -> Factors:
        """gate A, gate B, up A, up B, down A, down B of a slot, on the host."""
        gate_up_a, gate_up_b, down_a, down_b = (pool[slot, experts].cpu() for pool in self.pools)
        gate_a, up_a = gate_up_a.chunk(2, dim=-2)
        gate_b, up_b = gate_up_b.chunk(2, dim=-2)
        return gate_a, gate_b, up_a, up_b, down_a, down_b


@dataclass
class BatchSlots:
    """The slots of the batch that is being computed, found once for all of its layers, since on a GPU each small
    operation costs a launch."""

    _batch: Any = None
    _layer: int = 0
    _slots_T: torch.Tensor | None = None

    def of(self, batch: Any, slots_T: torch.Tensor, layer: int) -> torch.Tensor:
        """One slot per token, -1 where it holds no adapter. The layers of a batch come in ascending order; SGLang may
        fill the same object for another batch, whose first layer is then not above the last one."""
        if self._slots_T is None or batch is not self._batch or layer <= self._layer:
            self._slots_T = torch.where(_has_rank(slots_T, batch.lora_ranks), slots_T, -1)
        self._batch, self._layer = batch, layer
        return self._slots_T


SLOTS = BatchSlots()


def _has_rank(slots_T: torch.Tensor, ranks_S: torch.Tensor) -> torch.Tensor:
    """Per token: whether its slot is a real one that holds an adapter (SGLang gives bare requests a slot of rank 0)."""
    ranks_S = ranks_S.to(slots_T.device)
    return (slots_T >= 0) & (ranks_S[slots_T.clamp(min=0).long()] > 0)


def around_notify_lora_slots_updated(original: Callable[..., Any], manager: Any, slot_ids: set[int]) -> None:
    """AROUND hook of `LoRAManager._notify_lora_slots_updated`, called between two batches: packs what changed.

    Steps in flight still use the old adapters, so they are waited for.
    """
    original(manager, slot_ids)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    uids = {slot: uid for uid, slot in manager.memory_pool.uid_to_buffer_id.items()}
    LAYERS.slots_changed({slot: uid for slot, uid in uids.items() if uid is not None}, manager.loras)
    ranks = {slot: _rank(manager, uids.get(slot)) for slot in slot_ids}
    for modules in manager.lora_modules:
        for module in modules.values():
            if isinstance(module, FusedMoEWithLoRA):
                module.take_slots(ranks)


def _rank(manager: Any, uid: str | None) -> int:
    return 0 if uid is None or uid not in manager.loras else int(manager.loras[uid].config.r)


class _ExpertPoolsOnHost(TorchFunctionMode):  # type: ignore[misc]
    """Four-dimensional zero tensors (slot, expert, …, …) are created in host memory."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = dict(options or {})
        if function is torch.zeros and arguments and len(arguments[0]) == 4:
            return _on_pages(arguments[0], options.get("dtype") or torch.get_default_dtype())
        return function(*arguments, **options)


def _on_pages(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in host memory on separate pages, which can be registered with the GPU."""
    size = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8, count=size).view(dtype).view(*shape)


def around_init_buffers(original: Callable[..., Any], pool: Any, base_model: torch.nn.Module) -> None:
    """AROUND hook of `LoRAMemoryPool.init_buffers`: pools of routed experts use no device memory, and are as wide as
    this rank's CPU experts.

    Nothing on the device reads them: kt_kernels and resident.py copy their experts' factors.
    """
    if part := part_of(pool):
        pool.moe_tp_rank, pool.moe_tp_size = part
    with _ExpertPoolsOnHost():
        original(pool, base_model)
