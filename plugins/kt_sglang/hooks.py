"""Where our classes hook into SGLang: one row per seam, each with its reason, and the check that all of them hold.

SGLang logs a failed hook and runs on without it. `require_hooks` turns that into an exit, in the main process and
(through `proof.report`) in every scheduler.
"""

from __future__ import annotations

import multiprocessing
import pkgutil
from collections.abc import Callable
from typing import Any

from kt_model.installed import sglang_requirement
from kt_sglang.seams.imports import describe, resolve
from kt_sglang.seams.seam import Seam

RESULTS = "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
SEAMS: tuple[Seam, ...] = (
    Seam(
        "sglang.srt.layers.moe.kt_ep_wrapper.KTEPWrapperMethod",
        "kt_sglang.experts.method:KTEPWrapperMethod",
        "routed experts run in kt_kernels",
    ),
    Seam(
        "sglang.srt.lora.layers.FusedMoEWithLoRA",
        "kt_sglang.adapters.lora:FusedMoEWithLoRA",
        "expert adapters of a batch reach kt_kernels as one slot a token",
    ),
    Seam(
        "sglang.srt.lora.lora_manager.LoRAManager._notify_lora_slots_updated",
        "kt_sglang.adapters.lora:around_notify_lora_slots_updated",
        "a slot is packed when its content changes, not inside a forward",
    ),
    Seam(
        "sglang.srt.lora.mem_pool.LoRAMemoryPool.init_buffers",
        "kt_sglang.adapters.lora:around_init_buffers",
        "adapters of CPU experts take no memory of the GPU",
    ),
    Seam(
        "sglang.srt.lora.lora_config.LoRAConfig.get_lora_config",
        "kt_sglang.adapters.files:around_get_lora_config",
        "adapters of every format and scale rule become one rank, one alpha and names that SGLang knows",
    ),
    Seam(
        "sglang.srt.lora.lora.LoRAAdapter.initialize_weights",
        "kt_sglang.adapters.files:around_initialize_weights",
        "the adapter's files are read by the importer, which checks them and brings them to one form",
    ),
    Seam(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.load_lora_adapter",
        "kt_sglang.adapters.loading:around_load_lora_adapter",
        "an adapter that is loaded while serving is checked as one of the start, and the answer says what it is",
    ),
    Seam(
        "sglang.srt.lora.lora_registry.LoRARegistry.register",
        "kt_sglang.adapters.loading:around_register",
        "and it is proven before its name means anything",
    ),
    Seam(
        "sglang.srt.managers.scheduler.Scheduler.unload_lora_adapter",
        "kt_sglang.adapters.files:after_unload",
        "of an adapter that was unloaded nothing is kept",
    ),
    Seam(
        "sglang.srt.lora.utils.get_normalized_target_modules",
        "kt_sglang.adapters.files:around_get_normalized_target_modules",
        "adapters on MLA without a low-rank q: its modules keep their names",
    ),
    Seam(
        "sglang.srt.lora.lora.LoRAAdapter.normalize_qkv_proj",
        "kt_sglang.adapters.files:around_normalize_qkv_proj",
        "adapters on MLA without a low-rank q: no k_proj and v_proj to fuse with",
    ),
    Seam(
        "sglang.srt.lora.utils.get_default_hidden_dim",
        "kt_sglang.adapters.files:around_get_default_hidden_dim",
        "adapters on MLA without a low-rank q: sizes of its modules",
    ),
    Seam(
        "sglang.srt.model_loader.loader._initialize_model",
        "kt_sglang.checkpoint.tied_head:before_initialize_model",
        "an output head that is the embedding is a matrix of its own",
    ),
    Seam(
        "sglang.srt.model_loader.loader.DefaultModelLoader._get_weights_iterator",
        "kt_sglang.checkpoint.tied_head:around_get_weights_iterator",
        "an output head that is the embedding is loaded from it",
    ),
    Seam(
        "sglang.srt.configs.model_config.ModelConfig._get_hf_eos_token_id",
        "kt_sglang.sampling.ends:after_get_hf_eos_token_id",
        "an answer ends at tokens that the checkpoint names",
    ),
    Seam(
        "sglang.srt.model_loader.loader._initialize_model",
        "kt_sglang.checkpoint.unwritten_weights:after_initialize_model",
        "weights that nobody wrote are known by being NaN",
    ),
    Seam(
        "sglang.srt.model_loader.loader.DefaultModelLoader.load_weights_only",
        "kt_sglang.checkpoint.unwritten_weights:around_load_weights_only",
        "weights that nobody wrote end the start",
    ),
    Seam(
        "sglang.srt.model_executor.model_runner.ModelRunner.load_model",
        "kt_sglang.checkpoint.packed:after_load_model",
        "what a start had to pack is kept for the next one",
    ),
    Seam(
        "sglang.srt.model_loader.loader.DefaultModelLoader._prepare_weights",
        "kt_sglang.checkpoint.reading:around_prepare_weights",
        "the files that are read are those that the plan counted",
    ),
    Seam(
        "sglang.srt.model_loader.weight_utils.safetensors_weights_iterator",
        "kt_sglang.checkpoint.reading:around_weights_iterator",
        "fused experts come one by one; those of the packed cache or a quantized folder are not read",
    ),
    Seam(
        "sglang.srt.model_loader.weight_utils.buffered_multi_thread_safetensors_weights_iterator",
        "kt_sglang.checkpoint.reading:around_weights_iterator",
        "fused experts come one by one; those of the packed cache or a quantized folder are not read",
    ),
    Seam(
        "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController.get_internal_state",
        "kt_sglang.proof:after_get_internal_state",
        "the launcher asks each scheduler which experts ran where",
    ),
    Seam(
        "sglang.srt.managers.schedule_batch.Req._check_str_based_finish",
        "kt_sglang.sampling.patterns:around_check_str_based_finish",
        "a pattern of one request does not keep the scheduler from all others",
    ),
    Seam(
        "sglang.srt.managers.schedule_batch.Req.set_finish_with_abort",
        "kt_sglang.sampling.grammars:around_set_finish_with_abort",
        "what is wrong with a grammar is told in a sentence",
    ),
    Seam(
        "sglang.srt.constrained.json_schema_validation.validate_xgrammar_json_schema",
        "kt_sglang.sampling.grammars:around_validate_schema",
        "a schema that would be kept to in part is refused",
    ),
    Seam(
        "sglang.srt.constrained.xgrammar_backend.XGrammarGrammarBackend.dispatch_json",
        "kt_sglang.sampling.grammars:around_dispatch_json",
        "a schema that need not be kept to does not end a request",
    ),
    Seam(
        "sglang.srt.managers.tp_worker.TpModelWorker.get_worker_info",
        "kt_sglang.sampling.whole_context:around_get_worker_info",
        "a prompt and its answer may fill the context",
    ),
    Seam(
        "sglang.srt.managers.scheduler.configure_scheduler_process",
        "kt_sglang.process.process_cpus:after_configure_scheduler_process",
        "each of several processes has CPUs of its own, and the memory next to them",
    ),
    Seam(
        "sglang.srt.managers.scheduler_components.profiler_manager.SchedulerProfilerManager._start_profile",
        "kt_sglang.process.profiling:around_start_profile",
        "a profile requested during another one must not kill the scheduler",
    ),
    Seam(
        "sglang.srt.server_args.PortArgs.init_new",
        "kt_sglang.process.shared_names:after_init_new",
        "what schedulers have in shared memory is known by its name",
    ),
    Seam(
        "sglang.srt.utils.stale_shm_cleanup.make_shm_name",
        "kt_sglang.process.shared_names:around_make_shm_name",
        "the same of what ranks of tensor parallelism have there",
    ),
    Seam(
        "sglang.srt.managers.scheduler_components.output_sender.SenderWrapper.send_output",
        "kt_sglang.process.outputs:around_send_output",
        "a detokenizer that hangs is noticed: what it was sent is counted",
    ),
    Seam(
        "sglang.srt.layers.sampler.Sampler.forward",
        "kt_sglang.sampling.nan_guard:around_sample",
        "rows of logits without a number are noted before SGLang makes some up",
    ),
    Seam(
        "sglang.srt.layers.sampler.Sampler.compute_logprobs_only",
        "kt_sglang.sampling.nan_guard:around_sample",
        "the same where nothing is sampled",
    ),
    Seam(
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        "kt_sglang.sampling.seeds:after_init_new",
        "which rows of a batch belong to requests with a seed",
    ),
    Seam(
        "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch",
        "kt_sglang.sampling.penalties:after_from_schedule_batch",
        "penalties know the answer so far of a request that comes back into a batch",
    ),
    Seam(
        "sglang.srt.managers.schedule_batch.ScheduleBatch.cumulate_penalty_output_tokens",
        "kt_sglang.sampling.penalties:around_cumulate",
        "penalties count the tokens of the answer, and no token of the prompt",
    ),
    Seam(
        "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.copy_for_forward",
        "kt_sglang.sampling.penalties:after_copy_for_forward",
        "the token that the step before chose is counted, too",
    ),
    Seam(
        "sglang.srt.model_executor.model_runner.ModelRunner.sample",
        "kt_sglang.sampling.penalties:around_sample",
        "and that is done where it is known, on the device",
    ),
    Seam(
        "sglang.srt.layers.sampler.Sampler._sample_from_probs",
        "kt_sglang.sampling.seeds:around_sample_from_probs",
        "the same seed gives the same text",
    ),
    Seam(
        "sglang.srt.managers.utils.GenerationBatchResult.copy_to_cpu",
        "kt_sglang.sampling.nan_guard:around_copy_to_cpu",
        "and the notes come to the host with the tokens",
    ),
    Seam(
        f"{RESULTS}.process_batch_result_prefill",
        "kt_sglang.sampling.nan_guard:around_process_prefill",
        "a request whose logits are no numbers ends with an error, the others of its batch go on",
    ),
    Seam(
        f"{RESULTS}.process_batch_result_decode",
        "kt_sglang.sampling.nan_guard:around_process_decode",
        "the same in the middle of an answer",
    ),
    Seam(
        f"{RESULTS}._handle_finish_state_updated_req",
        "kt_sglang.sampling.nan_guard:around_finish_state_updated",
        "and nothing of it is kept for requests that begin like it",
    ),
)

GPU_SEAMS = (
    Seam(
        "sglang.srt.model_executor.model_runner.ModelRunner.load_model",
        "kt_sglang.prompts.prefill:after_load_model",
        "experts of long prompts come to the GPU through buffers, which the KV cache leaves room for",
    ),
    Seam(
        "sglang.srt.model_executor.model_runner.ModelRunner.load_model",
        "kt_sglang.experts.method:after_load_model",
        "kernels of resident experts are compiled before the first prompt that needs them",
    ),
    Seam(
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.execute",
        "kt_sglang.decode.captured:around_execute",
        "rows that pad a replayed step are computed by nobody",
    ),
    Seam(
        f"{RESULTS}.process_batch_result_decode",
        "kt_sglang.decode.captured:before_process_batch_result_decode",
        "a failure inside a replayed step reaches the scheduler as an exception",
    ),
    Seam(
        f"{RESULTS}.process_batch_result_prefill",
        "kt_sglang.decode.captured:before_process_batch_result_prefill",
        "waiting for a prompt uses no core on which another process computes experts",
    ),
)


def active_seams() -> tuple[Seam, ...]:
    """The seams of this process: the shared ones; those of `edge` in the main process, which serves HTTP; and those for
    an accelerator or for none (`without_gpu`)."""
    import torch

    from kt_sglang.edge import SEAMS as EDGE_SEAMS
    from kt_sglang.without_gpu import SEAMS as CPU_SEAMS

    spawned = multiprocessing.parent_process() is not None
    return SEAMS + (() if spawned else EDGE_SEAMS) + (GPU_SEAMS if torch.cuda.is_available() else CPU_SEAMS)


def register_hooks() -> None:
    """Register every active seam with SGLang. Raises ImportError or AttributeError if a seam has moved."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from kt_sglang.seams import propagation

    propagation.install()
    for seam in active_seams():
        resolve(seam.target)
        HookRegistry.register(seam.target, _load(seam.hook), HookType[seam.kind])
    import torch

    from kt_sglang.adapters.files import name_replicated_modules

    name_replicated_modules()
    if not torch.cuda.is_available():
        from kt_sglang.without_gpu import pinned_memory

        pinned_memory.install()


def missing_hooks() -> list[str]:
    """Targets of active seams that are not bound to our hook."""
    return [seam.target for seam in active_seams() if not _stands(seam)]


def import_failures() -> list[str]:
    """Why modules of active seams cannot be imported, each error once; [] if they can."""
    failures: dict[str, None] = {}
    for seam in active_seams():
        try:
            resolve(seam.target)
            _load(seam.hook)
        except ImportError as failure:
            failures[describe(failure)] = None
        except AttributeError:
            continue
    return list(failures)


def require_hooks() -> None:
    """Raise SystemExit naming every seam that does not hold, or what cannot be imported."""
    if failures := import_failures():
        raise SystemExit(f"kt_sglang: SGLang cannot be imported: {'; '.join(failures)}. Install what is missing.")
    missing = missing_hooks()
    if missing:
        raise SystemExit(
            "kt_sglang: SGLang did not take these hooks: " + ", ".join(missing) + ". This SGLang differs from the one "
            f"kt-launch knows; install {sglang_requirement()} or run `kt-launch doctor`."
        )


def _load(path: str) -> Callable[..., Any]:
    return pkgutil.resolve_name(path)  # type: ignore[no-any-return]


def _stands(seam: Seam) -> bool:
    try:
        current, hook = resolve(seam.target), _load(seam.hook)
    except (ImportError, AttributeError):
        return False
    if seam.kind == "REPLACE":
        return current is hook
    return hasattr(current, "__wrapped__") and _closes_over(current, hook)


def _closes_over(function: Any, hook: Any) -> bool:
    """Whether `function`, or a function that it wraps, holds `hook` in its closure (the registry's wrappers do)."""
    while function is not None:
        cells = getattr(function, "__closure__", None) or ()
        if any(cell.cell_contents is hook for cell in cells):
            return True
        function = getattr(function, "__wrapped__", None)
    return False
