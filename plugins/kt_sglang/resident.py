"""The resident experts of a layer: SGLang's own kernels on the model's device, and the adapters' part between and after
the two products, where SGLang's sequence of kernels has hooks.

Nothing here synchronizes, or allocates or branches depending on values, so that a CUDA graph can capture it. Without an
accelerator, without_gpu/resident_experts.py computes the same in plain torch.

Shapes: T tokens, K top-k, N resident experts, S adapter slots, R the pools' rank, H hidden size, I intermediate size, P
= T·K choices of an expert by a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from kt_sglang.reference import Factors

MOST_GATHERED_BYTES = 1 << 28
"""Number of choices for which factors are gathered at a time."""


class ResidentAdapters:
    """The resident experts' adapter factors for all slots of one layer, on the model's device. An empty slot is zero.
    The buffers keep their addresses: graphs read them."""

    def __init__(self, slots: int, experts: int, rank: int, hidden: int, inner: int, device: torch.device) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros((slots * experts, *shape), dtype=torch.bfloat16, device=device)

        self.slots, self.experts, self.rank = slots, experts, rank
        self.gate_up_a, self.gate_up_b = zeros(2 * rank, hidden), zeros(2, inner, rank)
        self.down_a, self.down_b = zeros(rank, inner), zeros(hidden, rank)

    def fill(self, slot: int, factors: Factors) -> None:
        """Store one adapter's factors of all resident experts, (N, …), B scaled."""
        gate_a, gate_b, up_a, up_b, down_a, down_b = factors
        at = slice(slot * self.experts, (slot + 1) * self.experts)
        self.gate_up_a[at].copy_(torch.cat((gate_a, up_a), dim=1))
        self.gate_up_b[at].copy_(torch.stack((gate_b, up_b), dim=1))
        self.down_a[at].copy_(down_a)
        self.down_b[at].copy_(down_b)

    def empty(self, slot: int) -> None:
        """Clear this slot."""
        at = slice(slot * self.experts, (slot + 1) * self.experts)
        for pool in (self.gate_up_a, self.gate_up_b, self.down_a, self.down_b):
            pool[at].zero_()

    def hooks(self, slots_T: torch.Tensor) -> Hooks:
        """The hooks that add a batch's adapters; slots_T: -1 for none."""
        return Hooks(self, slots_T)


@dataclass(frozen=True)
class Hooks:
    """Implements SGLang's LoRAHooks: both change the output of a product in place. A choice of a non-resident expert
    has id -1, and its rows may hold anything."""

    adapters: ResidentAdapters
    slots_T: torch.Tensor

    def after_gate_up(
        self, x_TH: torch.Tensor, out_TKI: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor
    ) -> None:
        """Gate and up, side by side in the last dimension, before the activation."""
        pools = self.adapters

        def add(rows: slice, at: torch.Tensor, here: torch.Tensor) -> None:
            x = x_TH[rows].repeat_interleave(ids_TK.shape[1], dim=0)
            low = torch.bmm(pools.gate_up_a[at], x.unsqueeze(-1)).view(len(at), 2, pools.rank, 1)
            delta = torch.matmul(pools.gate_up_b[at], low)
            self._add(out_TKI[rows], delta, here)

        self._in_pieces(ids_TK, pools.gate_up_a[0].nbytes + pools.gate_up_b[0].nbytes, add)

    def after_down(
        self, inner_PI: torch.Tensor, out_TKH: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor
    ) -> None:
        """Down; each choice's output is already multiplied by its weight."""
        pools, top_k = self.adapters, ids_TK.shape[1]

        def add(rows: slice, at: torch.Tensor, here: torch.Tensor) -> None:
            inner = inner_PI[rows.start * top_k : rows.stop * top_k].unsqueeze(-1)
            delta = torch.bmm(pools.down_b[at], torch.bmm(pools.down_a[at], inner))
            self._add(out_TKH[rows], delta * weights_TK[rows].reshape(-1, 1, 1), here)

        self._in_pieces(ids_TK, pools.down_a[0].nbytes + pools.down_b[0].nbytes, add)

    def _in_pieces(
        self, ids_TK: torch.Tensor, bytes_each: int, add: Callable[[slice, torch.Tensor, torch.Tensor], None]
    ) -> None:
        """`add` in blocks of rows: which factors each choice uses, and whether it uses any."""
        tokens, top_k = ids_TK.shape
        step = max(1, MOST_GATHERED_BYTES // (bytes_each * top_k))
        for first in range(0, tokens, step):
            rows = slice(first, min(first + step, tokens))
            ids, slots = ids_TK[rows], self.slots_T[rows].unsqueeze(-1)
            here = (ids >= 0) & (slots >= 0)
            at = torch.where(here, slots * self.adapters.experts + ids, 0)
            add(rows, at.reshape(-1).long(), here)

    @staticmethod
    def _add(out_TKX: torch.Tensor, delta: torch.Tensor, here_TK: torch.Tensor) -> None:
        added = torch.where(here_TK.unsqueeze(-1), delta.reshape(out_TKX.shape), 0)
        out_TKX.add_(added.to(out_TKX.dtype))


class ResidentExperts:
    """The resident experts of one layer."""

    def __init__(self, gpu_method: Any) -> None:
        self._method = gpu_method
        self.adapters: ResidentAdapters | None = None

    def create_runner(self, layer: torch.nn.Module, config: Any, count: int) -> None:
        """SGLang's runner for `count` experts. It must not change its input, which kt_kernels reads at the same time;
        the model's scale is applied by the model to the sum of both parts."""
        own = replace(config, num_local_experts=count, inplace=False, routed_scaling_factor=None)
        self._method.create_moe_runner(layer, own)

    def allocate_adapters(self, slots: int, rank: int, layer: torch.nn.Module) -> None:
        """Allocate the adapters of all slots."""
        experts, hidden, inner = layer.w2_weight.shape
        self.adapters = ResidentAdapters(slots, experts, rank, hidden, inner, layer.w2_weight.device)

    def run(self, layer: torch.nn.Module, dispatched: Any, slots_T: torch.Tensor | None) -> torch.Tensor:
        """Σ_k weight·expert(x) over the resident experts, with ids as numbered in the dispatched batch; (T, H)."""
        hooks = self.adapters.hooks(slots_T) if self.adapters and slots_T is not None else None
        return _sequence(dispatched.hidden_states)(self._method, layer, dispatched, hooks)


def _sequence(x_TH: torch.Tensor) -> Callable[[Any, torch.nn.Module, Any, Hooks | None], torch.Tensor]:
    if x_TH.is_cuda:
        return _in_sglang
    from kt_sglang.without_gpu.resident_experts import in_plain_torch

    return in_plain_torch


def _in_sglang(method: Any, layer: torch.nn.Module, dispatched: Any, hooks: Hooks | None) -> torch.Tensor:
    """SGLang's Triton kernels; with hooks, its sequence of kernels, since its fused entry point has no argument for
    them."""
    if hooks is None:
        return method.apply(layer, dispatched).hidden_states
    from sglang.srt.layers.moe.moe_runner.triton import pre_permute_standard_to_triton

    core = method.runner.runner_core
    weights, state = method.get_triton_quant_info(layer), dict[str, Any]()
    batch = pre_permute_standard_to_triton(dispatched, weights, core.config, state)
    return core.run(batch, weights, state, hooks=hooks).hidden_states
