"""What stock SGLang lacks on a machine without an accelerator; every file gives its trigger, why it is safe, and when
it can go. Nothing here is registered if CUDA is available.
"""

from kt_sglang.seams.seam import Seam

SEAMS: tuple[Seam, ...] = (
    Seam(
        "sglang.srt.entrypoints.engine._set_envs_and_config",
        "kt_sglang.without_gpu.forked:after_set_envs_and_config",
        "torch and SGLang are imported once a server, not once a process",
    ),
    Seam(
        "sglang.srt.models.deepseek_common.attention_backend_handler.AttentionBackendRegistry.get_handler",
        "kt_sglang.without_gpu.mla_dispatch:around_get_handler",
        "torch_native serves MLA from its latent pool",
    ),
    Seam(
        "sglang.srt.configs.update_config.adjust_config_with_unaligned_cpu_tp",
        "kt_sglang.without_gpu.unpadded_sizes:around_adjust_config_with_unaligned_cpu_tp",
        "models of every width, and adapters on them",
    ),
    Seam(
        "sglang.srt.layers.rotary_embedding.factory.get_rope_cpu",
        "kt_sglang.without_gpu.plain_rotary:around_get_rope_cpu",
        "MLA without rope_scaling",
    ),
    Seam(
        "sglang.srt.lora.backend.torch_backend.TorchNativeLoRABackend.run_lora_b_sgemm",
        "kt_sglang.without_gpu.replicated_adapters:around_run_lora_b_sgemm",
        "adapters on replicated layers, of which MLA has some",
    ),
    Seam(
        "sglang.srt.lora.backend.torch_backend.TorchNativeLoRABackend.prepare_lora_batch",
        "kt_sglang.without_gpu.head_adapters:after_prepare_lora_batch",
        "adapters on the output head, in batches of several requests",
    ),
    Seam(
        "sglang.srt.lora.layers.ParallelLMHeadWithLoRA.apply_lora",
        "kt_sglang.without_gpu.head_adapters:around_apply_lora",
        "adapters on the output head, in batches of several requests",
    ),
    Seam(
        "sglang.srt.lora.backend.base_backend._compute_moe_lora_info",
        "kt_sglang.without_gpu.token_mapping:around_compute_moe_lora_info",
        "long prompts of one adapter, or of the base, are prefilled together",
    ),
    Seam(
        "sglang.srt.lora.deepseek_mla_correction.apply_q_correction",
        "kt_sglang.without_gpu.mla_adapters:around_apply_q_correction",
        "adapters on kv_b_proj act in absorbed MLA",
    ),
    Seam(
        "sglang.srt.lora.deepseek_mla_correction.apply_v_correction",
        "kt_sglang.without_gpu.mla_adapters:around_apply_v_correction",
        "adapters on kv_b_proj act in absorbed MLA",
    ),
    Seam(
        "sglang.kernels.ops.elementwise.elementwise.fused_gate_sigmoid_mul_add",
        "kt_sglang.without_gpu.shared_expert_gate:around_fused_gate_sigmoid_mul_add",
        "Qwen2-MoE's shared expert is weighed without a GPU",
    ),
)
