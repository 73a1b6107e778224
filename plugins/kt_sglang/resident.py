"""The resident experts of a layer: SGLang's own kernels on the model's device, and the adapters' part between and after
the two products (resident_adapters.py), where SGLang's sequence of kernels has hooks.

What a CUDA graph captures of it does not synchronize, or allocate or branch depending on values. Without an
accelerator, without_gpu/resident_experts.py computes the same in plain torch.

Shapes: T tokens, K top-k, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from kt_sglang.resident_adapters import Hooks, ResidentAdapters


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
        self.adapters.prepare()

    def run(self, layer: torch.nn.Module, dispatched: Any, slots_T: torch.Tensor | None) -> torch.Tensor:
        """Σ_k weight·expert(x) over the resident experts, with ids as numbered in the dispatched batch; (T, H)."""
        x_TH, hooks = dispatched.hidden_states, None
        if self.adapters and slots_T is not None:
            hooks = self.adapters.hooks(x_TH, dispatched.topk_output.topk_ids, slots_T)
        return _sequence(x_TH)(self._method, layer, dispatched, hooks)


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
