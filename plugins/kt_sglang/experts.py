"""The experts method that SGLang calls for every MoE layer: routes a batch to kt_kernels and, when some experts
are resident on the accelerator, to SGLang's own method for those.

Not here: how weights arrive (weights.py), which adapter a token uses (lora.py), arithmetic (kt_kernels).

Shapes: T tokens, K top-k, E experts, H hidden size, I expert intermediate size.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase

from kt_sglang import captured
from kt_sglang.layers import LayerRecord
from kt_sglang.transfer import HostBatch
from kt_sglang.weights import ExpertWeights


class KTEPWrapperMethod(FusedMoEMethodBase):  # type: ignore[misc]  # the name is compared in FusedMoE's weight loader
    """CPU experts for one layer; experts below `num_gpu_experts` stay with `gpu_method`."""

    def __init__(self, gpu_method: Any, kt_config: Any) -> None:
        self.gpu_method = gpu_method
        self.kt_config = kt_config
        self.num_gpu_experts: int = kt_config.num_gpu_experts
        self.adapter_slots_T: torch.Tensor | None = None
        self.weights: ExpertWeights | None = None
        self.record = LayerRecord(kt_config.layer_idx)

    # Weights

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Parameters for the resident experts only; the others are handed to kt_kernels as they are loaded."""
        self.weights = ExpertWeights(self.kt_config, layer, num_experts, self.num_gpu_experts, hidden_size)
        attributes["weight_loader"] = self.weights.loader(attributes["weight_loader"])
        self.gpu_method.num_gpu_experts = self.num_gpu_experts
        self.gpu_method.create_weights(
            layer=layer,
            num_experts=self.num_gpu_experts,
            hidden_size=hidden_size,
            intermediate_size_per_partition=intermediate_size_per_partition,
            params_dtype=params_dtype,
            **attributes,
        )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """May run more than once (SGLang does it); demands that every CPU expert has arrived."""
        if self.num_gpu_experts and hasattr(self.gpu_method, "process_weights_after_loading"):
            self.gpu_method.process_weights_after_loading(layer)
        assert self.weights is not None
        self.weights.demand_complete()
        self.record.weights_loaded(self.weights)

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: Any) -> None:
        """Refuse what kt_kernels does not compute; give the resident experts their runner."""
        if moe_runner_config.activation != "silu" or not moe_runner_config.is_gated:
            raise ValueError(
                f"layer {self.kt_config.layer_idx}: activation {moe_runner_config.activation!r} is not supported on "
                "CPU experts, expected gated silu; serve this model without kt.*"
            )
        if moe_runner_config.apply_router_weight_on_input:
            raise ValueError(
                f"layer {self.kt_config.layer_idx}: apply_router_weight_on_input is not supported on CPU experts"
            )
        self.moe_runner_config = moe_runner_config
        if self.num_gpu_experts:
            moe_runner_config.num_local_experts = self.num_gpu_experts
            self.gpu_method.create_moe_runner(layer, moe_runner_config)

    # One batch of tokens

    def apply(self, layer: torch.nn.Module, dispatch_output: Any) -> Any:
        """Σ_k weight·expert(x) over this layer's experts, on the device of the hidden states. Changes no input."""
        from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
        from sglang.srt.layers.moe.topk import TopKOutputChecker

        topk = dispatch_output.topk_output
        if TopKOutputChecker.format_is_bypassed(topk):
            topk = topk.to_standard()
        x_TH, slots_T = dispatch_output.hidden_states, self.adapter_slots_T
        weights_TK, ids_TK, _ = topk
        out_TH = self._run_cpu_experts(x_TH, ids_TK, weights_TK, slots_T)
        if self.num_gpu_experts:
            out_TH = out_TH + self._run_resident_experts(layer, dispatch_output, topk)
        return StandardCombineInput(hidden_states=out_TH)

    def _run_cpu_experts(
        self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, slots_T: torch.Tensor | None
    ) -> torch.Tensor:
        assert self.weights is not None
        cpu_ids_TK = ids_TK - self.num_gpu_experts if self.num_gpu_experts else ids_TK
        if captured.is_warming_up(x_TH):
            self.weights.expect_replays()
            captured.steps().prepare(x_TH.shape[0], ids_TK.shape[1], x_TH.shape[1])
            return torch.zeros_like(x_TH)
        if captured.is_capturing(x_TH):
            moe, record = self.weights.moe, self.record.host
            return captured.steps().run(moe, record, x_TH, cpu_ids_TK, weights_TK, slots_T)
        batch = HostBatch.gather(x_TH, cpu_ids_TK, weights_TK, slots_T)
        out_TH = torch.empty_like(batch.x_TH)
        self.weights.moe.forward(batch.x_TH, batch.ids_TK, batch.weights_TK, batch.slots_T, out_TH)
        self.record.batch_ran(self.weights, batch, out_TH)
        return batch.give_back(out_TH)

    def _run_resident_experts(self, layer: torch.nn.Module, dispatch_output: Any, topk: Any) -> torch.Tensor:
        resident_TK = torch.where(topk.topk_ids < self.num_gpu_experts, topk.topk_ids, -1)
        combined = self.gpu_method.apply(
            layer, dispatch_output._replace(topk_output=topk._replace(topk_ids=resident_TK))
        )
        return combined.hidden_states

    def __getattr__(self, name: str) -> Any:
        if name in ("gpu_method", "kt_config", "weights"):
            raise AttributeError(name)
        return getattr(self.gpu_method, name)
