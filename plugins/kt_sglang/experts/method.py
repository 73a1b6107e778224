"""The experts method that SGLang calls for every MoE layer: routes a batch to kt_kernels and, when some experts
are resident on the accelerator, to SGLang's own method for those.

Not here: how weights arrive (weights.py), which adapter a token uses (lora.py), arithmetic (kt_kernels).

Shapes: T tokens, K top-k, E experts, H hidden size, I expert intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase

from kt_sglang.checkpoint.weights import ExpertWeights
from kt_sglang.decode import captured
from kt_sglang.experts.resident import ResidentExperts
from kt_sglang.moe import recording
from kt_sglang.moe.across_ranks import ExpertsOfRank0, part_of
from kt_sglang.moe.layers import LayerRecord
from kt_sglang.moe.placement import placement_of
from kt_sglang.moe.transfer import HostBatch
from kt_sglang.prompts.prefill import prefill


class KTEPWrapperMethod(FusedMoEMethodBase):  # type: ignore[misc]  # the name is compared in FusedMoE's weight loader
    """One layer's experts: `num_gpu_experts` stay with `gpu_method`, the others go to kt_kernels."""

    def __init__(self, gpu_method: Any, kt_config: Any) -> None:
        self.gpu_method = gpu_method
        self.kt_config = kt_config
        self.num_gpu_experts: int = kt_config.num_gpu_experts
        self.resident = ResidentExperts(gpu_method)
        self.adapter_slots_T: torch.Tensor | None = None
        self.weights: ExpertWeights | ExpertsOfRank0 | None = None
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
        """Parameters for the resident experts only; the others go to kt_kernels as they are loaded."""
        self.placement = placement_of(self.kt_config.layer_idx, num_experts, self.num_gpu_experts)
        if part_of(layer) is None:
            self.weights = ExpertsOfRank0(self.kt_config.layer_idx, self.placement)
        else:
            self.weights = ExpertWeights(self.kt_config, layer, self.placement, hidden_size)
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
        """May run more than once (SGLang does it); checks that every CPU expert has arrived."""
        if self.num_gpu_experts and hasattr(self.gpu_method, "process_weights_after_loading"):
            self.gpu_method.process_weights_after_loading(layer)
            self.placement.prepare(layer.w2_weight.device)
        assert self.weights is not None
        if isinstance(self.weights, ExpertsOfRank0):
            return
        self.weights.require_complete()
        self.record.weights_loaded(self.weights)
        recording.layer_loaded(self.kt_config.layer_idx, self.record.host, self.placement.num_experts)

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: Any) -> None:
        """Refuse what kt_kernels does not compute; create the resident experts' runner."""
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
            self.resident.create_runner(layer, moe_runner_config, self.num_gpu_experts)

    # One batch of tokens

    def apply(self, layer: torch.nn.Module, dispatch_output: Any) -> Any:
        """Σ_k weight·expert(x) over this layer's experts, on the device of the hidden states. Changes no input."""
        from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
        from sglang.srt.layers.moe.topk import TopKOutputChecker

        topk = dispatch_output.topk_output
        if TopKOutputChecker.format_is_bypassed(topk):
            topk = topk.to_standard()
        resident = None
        if self.num_gpu_experts:
            resident = partial(self._run_resident, layer, dispatch_output, topk)
        out_TH = self._run(dispatch_output.hidden_states, topk, resident)
        return StandardCombineInput(hidden_states=out_TH)

    def _run_resident(self, layer: torch.nn.Module, dispatch_output: Any, topk: Any) -> torch.Tensor:
        ids_TK = self.placement.resident_ids(topk.topk_ids)
        theirs = dispatch_output._replace(topk_output=topk._replace(topk_ids=ids_TK))
        return self.resident.run(layer, theirs, self.adapter_slots_T)

    def _run(self, x_TH: torch.Tensor, topk: Any, resident: Callable[[], torch.Tensor] | None) -> torch.Tensor:
        """Both parts: resident experts on the device while the others run on the CPU."""
        if isinstance(self.weights, ExpertsOfRank0):
            self.record.batch_passed()
            return resident() if resident else torch.zeros_like(x_TH)
        assert self.weights is not None
        weights_TK, ids_TK, _ = topk
        if captured.is_warming_up(x_TH):
            self.weights.expect_replays()
            captured.steps().prepare(x_TH.shape[0], ids_TK.shape[1], x_TH.shape[1])
            if resident is None:
                return torch.zeros_like(x_TH)
            captured.steps().prepare_side()
            return resident()
        if not captured.is_capturing(x_TH):
            return self._run_now(x_TH, ids_TK, weights_TK, resident)
        steps, slots_T, numbers = captured.steps(), self.adapter_slots_T, self.placement.cpu_numbers
        cpu = partial(steps.run, self.weights.moe, self.record.host, x_TH, ids_TK, weights_TK, slots_T, numbers)
        return steps.run_beside(cpu, resident) if resident else cpu()

    def _run_now(
        self,
        x_TH: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        resident: Callable[[], torch.Tensor] | None,
    ) -> torch.Tensor:
        assert self.weights is not None and not isinstance(self.weights, ExpertsOfRank0)
        layer, slots_T, on_cpu_TK = self.weights.layer_id, self.adapter_slots_T, self.placement.cpu_ids(ids_TK)
        on_card = prefill()
        if on_card and on_card.takes(layer, x_TH.shape[0], slots_T):
            streamed_TH = on_card.run(layer, x_TH, on_cpu_TK, weights_TK, slots_T)
            if streamed_TH is not None:
                recording.batch_ran(layer, on_cpu_TK, self.placement.num_experts)
                return streamed_TH + resident() if resident else streamed_TH
        batch = HostBatch.gather(x_TH, on_cpu_TK, weights_TK, slots_T)
        from_device_TH = resident() if resident else None  # an accelerator goes on by itself
        out_TH = torch.empty_like(batch.x_TH)
        with self.record.timed():
            self.weights.moe.forward(batch.x_TH, batch.ids_TK, batch.weights_TK, batch.slots_T, out_TH)
        combined_TH = batch.give_back(out_TH)
        if on_card:
            on_card.check(layer, self.weights.moe, x_TH, batch)
        if from_device_TH is not None:
            combined_TH = combined_TH + from_device_TH
        recording.batch_ran(self.weights.layer_id, batch.ids_TK, self.placement.num_experts)
        self.record.batch_ran(self.weights, batch, ids_TK, combined_TH)
        return combined_TH

    def __getattr__(self, name: str) -> Any:
        if name in ("gpu_method", "kt_config", "weights", "placement", "resident"):
            raise AttributeError(name)
        return getattr(self.gpu_method, name)


def after_load_model(result: Any, runner: Any, *_: Any, **__: Any) -> Any:
    """AFTER hook of `ModelRunner.load_model`: one layer's resident experts compile what all of them need."""
    for layer in runner.model.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, KTEPWrapperMethod) and method.num_gpu_experts:
            with torch.inference_mode():
                method.resident.compile_kernels(layer, method.moe_runner_config.top_k)
            break
    return result
