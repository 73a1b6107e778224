"""The resident experts of a layer: SGLang's own kernels on the model's device, and the adapters' part between and after
the two products (resident_adapters.py), where SGLang's sequence of kernels has hooks.

What a CUDA graph captures of it does not synchronize, or allocate or branch depending on values. Without an
accelerator, without_gpu/resident_experts.py computes the same in plain torch.

Shapes: T tokens, K top-k, H hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from kt_sglang.experts.resident_adapters import Hooks, ResidentAdapters

logger = logging.getLogger(__name__)
KINDS_OF_SIZES = 16
"""Triton compiles SGLang's kernels separately for sizes that are multiples of 16."""


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

    def compile_kernels(self, layer: torch.nn.Module, top_k: int) -> None:
        """Run the layer with as many tokens as SGLang's kernels tell apart, so that none is compiled for the first
        prompt of its kind: up to as many as experts with one set of blocks, more with another, each by what their
        choices and the padded number of rows are multiples of. All layers share what is compiled. A failure is logged:
        then the first batch that needs a kernel compiles it, or fails."""
        from sglang.srt.layers.moe.token_dispatcher import StandardDispatchOutput
        from sglang.srt.layers.moe.topk import StandardTopKOutput

        experts, hidden, _ = layer.w2_weight.shape
        device = layer.w2_weight.device
        try:
            for tokens in range(1, experts + KINDS_OF_SIZES + 1):
                ids_TK = torch.arange(tokens * top_k, dtype=torch.int32, device=device).view(tokens, top_k) % experts
                topk = StandardTopKOutput(torch.zeros(tokens, top_k, device=device), ids_TK, None)
                x_TH = torch.zeros(tokens, hidden, dtype=layer.w2_weight.dtype, device=device)
                self.run(layer, StandardDispatchOutput(x_TH, None, topk), None)
        except Exception as failure:  # any failure of the GPU's kernels or their compiler: what is served will tell
            logger.warning("resident experts were not compiled ahead: %s: %s", type(failure).__name__, failure)

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
