"""`python -P -m kt_sglang.seam_check`: loads the plugin into the installed SGLang and reports what does not fit.

By signature, not by version: a class of ours must accept whatever SGLang passes to the class that it replaces. Prints
one line of JSON.
"""

from __future__ import annotations

import inspect
import json
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from kt_model.gc_pause import gc_paused

RESULTS = "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
SIGNATURES: Mapping[str, list[str]] = {
    f"sglang.srt.{path}": names.split()
    for path, names in {
        "layers.moe.kt_ep_wrapper.KTEPWrapperMethod.__init__": "self gpu_method kt_config",
        "layers.moe.kt_ep_wrapper.KTEPWrapperMethod.create_weights": "self layer num_experts hidden_size "
        "intermediate_size_per_partition params_dtype",
        "layers.moe.kt_ep_wrapper.KTEPWrapperMethod.apply": "self layer dispatch_output",
        "layers.moe.fused_moe_triton.layer.FusedMoE.weight_loader": "self param loaded_weight weight_name shard_id "
        "expert_id",
        "lora.layers.FusedMoEWithLoRA.__init__": "self base_layer lora_backend",
        "lora.layers.FusedMoEWithLoRA.set_lora_info": "self gate_up_lora_a_weights gate_up_lora_b_weights "
        "down_lora_a_weights down_lora_b_weights",
        "lora.layers.FusedMoEWithLoRA.forward": "self hidden_states topk_output",
        "entrypoints.engine._set_envs_and_config": "server_args",
        "managers.scheduler.configure_scheduler_process": "server_args gpu_id",
        "managers.scheduler.Scheduler.unload_lora_adapter": "self recv_req",
        "managers.scheduler_components.output_sender.SenderWrapper.send_output": "self output",
        "managers.tokenizer_manager.TokenizerManager._handle_batch_output": "self recv_obj",
        "server_args.PortArgs.init_new": "server_args",
        "utils.stale_shm_cleanup.make_shm_name": "kind",
        "lora.lora_manager.LoRAManager._notify_lora_slots_updated": "self slot_ids",
        "lora.mem_pool.LoRAMemoryPool.init_buffers": "self base_model",
        "model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.execute": "self forward_batch",
        f"{RESULTS}.process_batch_result_decode": "self batch result",
        f"{RESULTS}.process_batch_result_prefill": "self batch result",
        f"{RESULTS}._handle_finish_state_updated_req": "self req batch",
        f"{RESULTS}._handle_sampling_mask_abort": "self req",
        "layers.sampler.Sampler.forward": "self logits_output",
        "layers.sampler.Sampler.compute_logprobs_only": "self logits_output",
        "layers.sampler.Sampler._sample_from_probs": "self probs sampling_info positions simple_sampling_case",
        "model_executor.forward_batch_info.ForwardBatch.init_new": "batch model_runner",
        "managers.tokenizer_manager.TokenizerManager._handle_batch_request": "self obj request request_states",
        "managers.tokenizer_manager.TokenizerManager._send_one_request": "self tokenized_obj",
        "entrypoints.ollama.serving.OllamaServing._convert_options_to_sampling_params": "self options",
        "managers.utils.GenerationBatchResult.copy_to_cpu": "self",
        "managers.tokenizer_manager.TokenizerManager._handle_abort_finish_reason": "self out",
        "lora.backend.torch_backend.TorchNativeLoRABackend.prepare_lora_batch": "self forward_batch weight_indices",
        "lora.layers.ParallelLMHeadWithLoRA.apply_lora": "self base_output hidden_states",
        "lora.lora_config.LoRAConfig.get_lora_config": "self",
        "managers.tokenizer_manager.TokenizerManager.generate_request": "self obj request",
        "managers.tokenizer_manager.TokenizerManager.unload_lora_adapter": "self obj",
        "managers.tokenizer_manager.TokenizerManager.configure_logging": "self obj",
        "managers.tokenizer_manager.TokenizerManager._validate_one_request": "self obj input_ids",
        "managers.io_struct.GenerateReqInput._handle_parallel_sampling": "self",
        "sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch": "batch",
        "sampling.sampling_batch_info.SamplingBatchInfo.copy_for_forward": "self",
        "managers.schedule_batch.ScheduleBatch.cumulate_penalty_output_tokens": "self",
        "model_executor.model_runner.ModelRunner.sample": "self logits_output forward_batch",
        "managers.schedule_batch.Req._check_str_based_finish": "self",
        "managers.schedule_batch.Req.set_finish_with_abort": "self error_msg",
        "constrained.json_schema_validation.validate_xgrammar_json_schema": "schema",
        "constrained.xgrammar_backend.XGrammarGrammarBackend.dispatch_json": "self key_string",
        "entrypoints.openai.protocol.ChatCompletionRequest.to_sampling_params": "self stop model_generation_config "
        "tool_call_constraint",
        "function_call.utils.get_json_schema_constraint": "tools tool_choice parallel_tool_calls",
        "managers.tp_worker.TpModelWorker.get_worker_info": "self",
        "entrypoints.openai.protocol.ResponsesRequest.to_sampling_params": "self default_max_tokens default_params",
        "configs.model_config.ModelConfig._get_hf_eos_token_id": "self",
        "configs.model_config.ModelConfig.get_default_sampling_params": "self",
        "entrypoints.openai.serving_completions.OpenAIServingCompletion._build_sampling_params": "self request",
        "entrypoints.openai.serving_responses.OpenAIServingResponses._make_request": "self request",
        "entrypoints.openai.serving_chat.OpenAIServingChat.__init__": "self tokenizer_manager template_manager",
        "entrypoints.ollama.serving.OllamaServing._generate_chat_response": "self gen_request",
        "entrypoints.ollama.serving.OllamaServing._generate_generate_response": "self gen_request",
        "entrypoints.ollama.serving.OllamaServing.handle_chat": "self request",
        "entrypoints.ollama.serving.OllamaServing.handle_generate": "self request",
        "entrypoints.openai.serving_chat.OpenAIServingChat._convert_to_internal_request": "self request",
        "entrypoints.openai.serving_completions.OpenAIServingCompletion._convert_to_internal_request": "self request",
        "constrained.json_schema_validation._iter_subschemas": "schema",
        "runtime_context.get_exec": "",
        "entrypoints.openai.serving_tokenize.OpenAIServingDetokenize._handle_non_streaming_request": "self "
        "adapted_request request",
        "entrypoints.openai.serving_base.OpenAIServingBase._parse_model_parameter": "self model",
        "parser.template_manager.TemplateManager.guess_chat_template_from_model_path": "self model_path",
        "function_call.function_call_parser.FunctionCallParser.parse_non_stream": "self full_text",
        "function_call.function_call_parser.FunctionCallParser.parse_stream_chunk": "self chunk_text",
        "function_call.function_call_parser.FunctionCallParser.parse_stream_end": "self",
        "function_call.json_array_parser.JsonArrayParser.parse_streaming_increment": "self new_text tools",
        "function_call.json_array_parser.JsonArrayParser.finish": "self tools",
        "parser.template_manager.TemplateManager._select_named_template": "self templates tokenizer_manager",
        "entrypoints.openai.chat_encoding.resolve_chat_encoding_spec": "hf_config tokenizer tool_call_parser",
        "entrypoints.openai.serving_chat.OpenAIServingChat._handle_last_assistant_message": "self messages request",
        "entrypoints.anthropic.serving.AnthropicServing._convert_to_chat_completion_request": "self anthropic_request",
        "entrypoints.anthropic.serving.AnthropicServing._convert_response": "self response",
        "entrypoints.anthropic.serving.AnthropicServing._generate_anthropic_stream": "self adapted_request "
        "processed_request anthropic_request",
        "entrypoints.openai.serving_chat.OpenAIServingChat._process_messages": "self request is_multimodal",
        "entrypoints.openai.serving_chat.OpenAIServingChat._render_and_encode_chat_template": "self messages tools "
        "template_kwargs",
        "entrypoints.ollama.serving.OllamaServing.__init__": "self tokenizer_manager",
        "entrypoints.ollama.serving.OllamaServing.get_tags": "self",
        "entrypoints.ollama.serving.OllamaServing._stream_chat_response": "self",
        "entrypoints.ollama.serving.OllamaServing._stream_generate_response": "self",
        "entrypoints.http_server.build_server_info": "server_args scheduler_info",
        "entrypoints.http_server._freeze_gc_after_server_warmup": "server_args",
        "managers.tokenizer_manager.TokenizerManager.freeze_gc": "self",
        "managers.scheduler_components.profiler_manager.SchedulerProfilerManager._start_profile": "self stage",
        "managers.tokenizer_manager.TokenizerManager.load_lora_adapter": "self obj",
        "lora.lora_registry.LoRARegistry.register": "self lora_ref",
        "model_executor.model_runner.ModelRunner.load_model": "self",
        "model_loader.loader.DefaultModelLoader._prepare_weights": "self model_name_or_path revision fall_back_to_pt "
        "allow_patterns_overrides",
        "model_loader.loader._initialize_model": "model_config",
        "model_loader.loader.DefaultModelLoader._get_weights_iterator": "self source",
        "model_loader.loader.DefaultModelLoader.load_weights_only": "model weights target_device",
        "model_loader.weight_utils.safetensors_weights_iterator": "hf_weights_files",
        "model_loader.weight_utils.buffered_multi_thread_safetensors_weights_iterator": "hf_weights_files",
        "managers.scheduler_components.internal_state.SchedulerInternalStateController.get_internal_state": "self "
        "recv_req",
        "models.deepseek_common.attention_backend_handler.AttentionBackendRegistry.get_handler": "backend_name",
    }.items()
}
"""What hooks also rely on: dotted path in SGLang → its first parameters, in this order."""


def main() -> None:
    from kt_sglang.without_gpu import torchvision_shim

    with gc_paused():
        torchvision_shim.install_if_needed()
        from kt_sglang.hooks import active_seams, import_failures

        seams = active_seams()
        failures = import_failures()
    mistakes = [] if failures else list(_mistakes(seams))
    print(json.dumps({"seams": len(seams), "not_imported": failures, "mistakes": mistakes}))


def _mistakes(seams: Iterable[Any]) -> Iterator[str]:
    """What has moved; if nothing has, hooks that SGLang did not apply for another reason."""
    moved = [mistake for seam in seams for mistake in _signature_mistakes(seam.target, seam.hook, seam.kind)]
    moved += moved_signatures(SIGNATURES)
    yield from moved or _hooks_not_taken()


def _hooks_not_taken() -> list[str]:
    import kt_sglang
    from kt_sglang import edge
    from kt_sglang.hooks import missing_hooks

    kt_sglang.activate()
    from sglang.srt.plugins import load_plugins

    load_plugins()
    missing = [f"SGLang did not take the hook on {target}" for target in missing_hooks()]
    return missing + [f"SGLang has no endpoint {name}" for name in edge.missing_endpoints()]


def _signature_mistakes(target: str, hook: str, kind: str) -> Iterator[str]:
    from kt_sglang.seams.imports import resolve

    try:
        original = resolve(target)
    except AttributeError as failure:
        yield f"{target} is gone ({failure})"
        return
    if kind == "REPLACE":
        yield from class_mistakes(target, original, pkgutil.resolve_name(hook))


def moved_signatures(expected: Mapping[str, list[str]]) -> Iterator[str]:
    """Functions of SGLang that are gone, or whose first parameters differ from the expected ones."""
    from kt_sglang.seams.imports import resolve

    for path, names in expected.items():
        try:
            found = inspect.signature(resolve(path)).parameters
        except AttributeError as failure:
            yield f"{path} is gone ({failure})"
            continue
        if list(found)[: len(names)] != names:
            yield f"{path} takes ({', '.join(found)}), expected ({', '.join(names)}, ...)"


def class_mistakes(target: str, original: type, ours: type) -> Iterator[str]:
    """Our methods that do not accept what SGLang's method of the same name accepts."""
    for name, method in vars(ours).items():
        theirs = vars(original).get(name)
        if inspect.isfunction(method) and inspect.isfunction(theirs) and not accepts(method, theirs):
            yield f"{target}.{name} takes {inspect.signature(theirs)}, expected {inspect.signature(method)}"


def accepts(ours: Callable[..., Any], theirs: Callable[..., Any]) -> bool:
    """Whether a call with all parameters of `theirs`, by position or by name, would reach `ours`."""
    mine, other = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in mine.values())
    named = [
        name
        for name, parameter in other.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if not open_ended and any(name not in mine for name in named):
        return False
    required = [
        name
        for name, parameter in mine.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    return all(name in other for name in required)


if __name__ == "__main__":
    main()
