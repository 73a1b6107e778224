"""The MoE layers of this process, by number: where their experts come from, what ran through kt_kernels, and one token
recomputed in float32 (reference.py). LAYERS is the one registry.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

import kt_kernels
from kt_model.contract import NO_ADAPTER, PROFILE, LayerReport
from kt_model.weights.packed import CacheKey
from kt_sglang.moe import reference
from kt_sglang.moe.placement import Placement
from kt_sglang.moe.served_checkpoint import served_checkpoint
from kt_sglang.moe.transfer import HostBatch


class CpuExperts(Protocol):
    """One layer's experts in kt_kernels; weights.py has the class."""

    layer_id: int
    placement: Placement
    top_k: int
    is_part: bool
    """Whether this process's output of the layer is a part of a sum over ranks."""
    mapped: bool
    from_elsewhere: bool
    """Whether they come from the packed cache or a folder of quantized experts instead of the checkpoint."""
    is_complete: bool

    @property
    def moe(self) -> kt_kernels.MoE: ...

    @property
    def cache_key(self) -> CacheKey: ...


class AdapterSlots(Protocol):
    """One layer's expert adapters; lora.py has the class."""

    @property
    def packed_slots(self) -> int: ...

    @property
    def pools(self) -> tuple[torch.Tensor, ...]: ...

    def factors(self, slot: int, expert: int) -> reference.Factors: ...


@dataclass
class Layers:
    """checked: for loaded adapters whose rows went through kt_kernels, by SGLang's id, the error of their first row. By
    the time of a query, the slot may hold another adapter."""

    records: dict[int, LayerRecord] = field(default_factory=dict)
    weights: dict[int, CpuExperts] = field(default_factory=dict)
    slots: dict[int, str] = field(default_factory=dict)
    """SGLang's id of the adapter now in a slot."""
    checked: dict[str, float | None] = field(default_factory=dict)

    def slots_changed(self, slots: Mapping[int, str], loaded: Collection[str]) -> None:
        """slots: the adapters in them now, by SGLang's id. loaded: all loaded adapters."""
        self.slots = dict(slots)
        self.checked = {adapter: error for adapter, error in self.checked.items() if adapter in loaded}


LAYERS = Layers()


class LayerRecord:
    """Counters of one MoE layer. Registers itself: a layer built twice (draft, reload) keeps its latest record."""

    def __init__(self, layer_id: int) -> None:
        self.layer_id = layer_id
        self.lora: AdapterSlots | None = None
        self.isa = self.method = ""
        self.experts = self.packed_bytes = 0
        self.mapped = False
        self.batches = self.tokens = self.adapter_tokens = self.passed = self.eager_ns = 0
        self.host = kt_kernels.HostRecord()
        """Results of replayed steps."""
        self.reference_error: dict[int, float | None] = {}  # by slot; NO_ADAPTER is the base
        self._read_phases: Callable[[], dict[str, dict[str, int]] | None] = lambda: None
        LAYERS.records[layer_id] = self

    def weights_loaded(self, weights: CpuExperts) -> None:
        """Record which kernel received how many experts."""
        moe = weights.moe
        self.isa, self.method = moe.isa, moe.method
        self.experts, self.packed_bytes = moe.num_experts, moe.packed_bytes
        self.mapped = weights.mapped
        if os.environ.get(PROFILE):
            moe.set_profiling(True)
            self._read_phases = moe.read_profile

    def batch_ran(self, weights: CpuExperts, batch: HostBatch, ids_TK: torch.Tensor, out_TH: torch.Tensor) -> None:
        """Count one batch that kt_kernels has computed, and check its first token of each new slot. ids_TK are the
        router's, out_TH is the whole layer's: both as the model sees them."""
        self.batches += 1
        self.tokens += batch.x_TH.shape[0]
        if batch.slots_T is not None:
            self.adapter_tokens += int((batch.slots_T >= 0).sum())
        if self.layer_id == min(LAYERS.records):
            self._check_new_slots(weights, batch, ids_TK, out_TH)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Adds to the time of the kernels in steps that no graph replays."""
        began = time.perf_counter_ns()
        yield
        self.eager_ns += time.perf_counter_ns() - began

    def batch_passed(self) -> None:
        """Count one batch to which this process contributes no CPU experts: the first rank does."""
        self.passed += 1

    def forget_slots(self, slots: set[int]) -> None:
        """These slots hold other adapters now: their next batch is checked again."""
        for slot in slots:
            self.reference_error.pop(slot, None)

    def _check_new_slots(
        self, weights: CpuExperts, batch: HostBatch, ids_TK: torch.Tensor, out_TH: torch.Tensor
    ) -> None:
        """One rank of several has only a part of a sum, which cannot be compared: only that it ran is recorded."""
        slots = batch.slots
        for slot in set(slots) - self.reference_error.keys():
            token = slots.index(slot)
            error = None if weights.is_part else self._error(batch, ids_TK[token], out_TH[token].cpu(), token, slot)
            self.reference_error[slot] = error
            if slot in LAYERS.slots:
                LAYERS.checked[LAYERS.slots[slot]] = error

    def _error(self, batch: HostBatch, ids_K: torch.Tensor, out_H: torch.Tensor, token: int, slot: int) -> float | None:
        factors = None if slot == NO_ADAPTER or self.lora is None else partial(self.lora.factors, slot)
        return reference.relative_error(
            served_checkpoint(),
            self.layer_id,
            batch.x_TH[token],
            ids_K.tolist(),
            batch.weights_TK[token].tolist(),
            factors,
            out_H,
        )

    def as_dict(self) -> LayerReport:
        """Plain values, ready for JSON."""
        return {
            "layer": self.layer_id,
            "isa": self.isa,
            "method": self.method,
            "experts": self.experts,
            "packed_bytes": self.packed_bytes,
            "mapped": self.mapped,
            "batches": self.batches + self.host.calls,
            "tokens": self.tokens + self.host.tokens,
            "adapter_tokens": self.adapter_tokens + self.host.adapter_tokens,
            "passed": self.passed,
            "replayed": self.host.calls,
            "replayed_adapter_tokens": self.host.adapter_tokens,
            "replayed_experts": self.host.experts_read,
            "replayed_ns": self.host.busy_ns,
            "eager_ns": self.eager_ns,
            "recent": self.host.recent() if os.environ.get(PROFILE) else None,
            "adapter_slots": self.lora.packed_slots if self.lora else 0,
            "phases": self._read_phases(),
            "lora_layer": type(self.lora).__module__ if self.lora else None,
            "reference_error": {str(slot): error for slot, error in self.reference_error.items()},
        }
