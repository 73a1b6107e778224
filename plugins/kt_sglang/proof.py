"""What ran, as seen from inside the scheduler: one record a MoE layer, given to the launcher on request.

SGLang swallows plugin failures, so the launcher believes only this: the classes in place, the experts loaded, the
batches and adapter rows that went through kt_kernels, and one token recomputed in float32 (reference.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import kt_kernels
from kt_sglang import reference

if TYPE_CHECKING:
    import torch

    from kt_sglang.lora import FusedMoEWithLoRA
    from kt_sglang.transfer import HostBatch
    from kt_sglang.weights import ExpertWeights

RECORDS: dict[int, LayerRecord] = {}
SLOTS: dict[int, str] = {}
"""SGLang's id of the adapter that a slot holds now."""
CHECKED: dict[str, float | None] = {}
"""Of loaded adapters whose rows went through kt_kernels, by SGLang's id: the error of the first of them. A slot may
hold another adapter by the time somebody asks."""
NO_ADAPTER = -1
PROFILE = "KT_LAUNCH_PROFILE"
"""Set by the plan where somebody looks at where the experts' time goes."""


class LayerRecord:
    """Counters of one MoE layer. Registers itself: a layer built twice (draft, reload) keeps its latest record."""

    def __init__(self, layer_id: int) -> None:
        self.layer_id = layer_id
        self.lora: FusedMoEWithLoRA | None = None
        self.isa = self.method = ""
        self.experts = self.packed_bytes = 0
        self.mapped = False
        self.batches = self.tokens = self.adapter_tokens = 0
        self.host = kt_kernels.HostRecord()
        """What replayed steps leave behind."""
        self.reference_error: dict[int, float | None] = {}  # by slot; NO_ADAPTER is the base
        self._read_phases: Callable[[], dict[str, dict[str, int]] | None] = lambda: None
        RECORDS[layer_id] = self

    def weights_loaded(self, weights: ExpertWeights) -> None:
        """Note which kernel took how many experts."""
        moe = weights.moe
        self.isa, self.method = moe.isa, moe.method
        self.experts, self.packed_bytes = moe.num_experts, moe.packed_bytes
        self.mapped = weights.mapped
        if os.environ.get(PROFILE):
            moe.set_profiling(True)
            self._read_phases = moe.read_profile

    def batch_ran(self, weights: ExpertWeights, batch: HostBatch, out_TH: torch.Tensor) -> None:
        """Count one batch that came back from kt_kernels, and check its first token of each new slot."""
        self.batches += 1
        self.tokens += batch.x_TH.shape[0]
        if batch.slots_T is not None:
            self.adapter_tokens += int((batch.slots_T >= 0).sum())
        if self.layer_id == min(RECORDS):
            self._check_new_slots(weights, batch, out_TH)

    def forget_slots(self, slots: set[int]) -> None:
        """These slots hold other adapters now: their next batch is checked again."""
        for slot in slots:
            self.reference_error.pop(slot, None)

    def _check_new_slots(self, weights: ExpertWeights, batch: HostBatch, out_TH: torch.Tensor) -> None:
        """One rank of several has a part of a sum, which nothing is known to compare with: that it ran is noted."""
        slots = [NO_ADAPTER] * len(out_TH) if batch.slots_T is None else batch.slots_T.tolist()
        for slot in set(slots) - self.reference_error.keys():
            error = None if weights.tp_size > 1 else self._error(weights, batch, out_TH, slots.index(slot), slot)
            self.reference_error[slot] = error
            if slot in SLOTS:
                CHECKED[SLOTS[slot]] = error

    def _error(
        self, weights: ExpertWeights, batch: HostBatch, out_TH: torch.Tensor, token: int, slot: int
    ) -> float | None:
        from kt_sglang.adapters import served_checkpoint

        factors = None if slot == NO_ADAPTER or self.lora is None else partial(self.lora.factors, slot)
        return reference.relative_error(
            served_checkpoint(),
            self.layer_id,
            batch.x_TH[token],
            [e + weights.first_expert if e >= 0 else e for e in batch.ids_TK[token].tolist()],
            batch.weights_TK[token].tolist(),
            factors,
            out_TH[token],
        )

    def as_dict(self) -> dict[str, Any]:
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
            "replayed": self.host.calls,
            "replayed_adapter_tokens": self.host.adapter_tokens,
            "adapter_slots": self.lora.packed_slots if self.lora else 0,
            "phases": self._read_phases(),
            "lora_layer": type(self.lora).__module__ if self.lora else None,
            "reference_error": {str(slot): error for slot, error in self.reference_error.items()},
        }


def slots_changed(slots: Mapping[int, str], loaded: Collection[str]) -> None:
    """slots: the adapters in them now, by SGLang's id. loaded: all that there are."""
    SLOTS.clear()
    SLOTS.update(slots)
    for adapter in CHECKED.keys() - {*loaded}:
        del CHECKED[adapter]


def report() -> dict[str, Any]:
    """The scheduler's answer: hooks that are missing (should be none) and a record a layer."""
    from kt_sglang import packed, reading
    from kt_sglang.hooks import missing_hooks

    return {
        "pid": os.getpid(),
        "packed_cache": packed.report(),
        "unread_tensors": reading.unread_tensors(),
        "missing_hooks": missing_hooks(),
        "slots": {str(slot): adapter for slot, adapter in SLOTS.items()},
        "checked_adapters": dict(CHECKED),
        "layers": [RECORDS[layer].as_dict() for layer in sorted(RECORDS)],
    }


def after_get_internal_state(result: Any, *_: Any, **__: Any) -> Any:
    """AFTER hook: adds `kt_launch` to what `/server_info` returns under `internal_states`."""
    result.internal_state["kt_launch"] = report()
    return result
