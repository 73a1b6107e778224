"""Routes of SGLang's that a server of ours does not offer, each with its reason, and what routes let escape as status
500 although the request is at fault. Data only.
"""

from __future__ import annotations

from collections.abc import Mapping

_WEIGHTS = (
    "the experts' weights are packed for the CPU and do not change while a server runs, so the model would become half "
    "the old one and half the new. Start a server on the other checkpoint"
)
_REMOTE = "the experts' weights are packed for the CPU and cannot be sent to another server"
_RECORD = (
    "this server records no experts, and SGLang's scheduler ends when it is asked to. Start it with "
    "server.extra_args=[--expert-distribution-recorder-mode,stat]"
)

REFUSED: dict[str, str] = {
    "update_weights_from_disk": _WEIGHTS,
    "update_weights_from_tensor": _WEIGHTS,
    "update_weights_from_distributed": _WEIGHTS,
    "update_weights_from_ipc": _WEIGHTS,
    "begin_weight_update": _WEIGHTS,
    "end_weight_update": _WEIGHTS,
    "init_weights_update_group": _WEIGHTS,
    "destroy_weights_update_group": _WEIGHTS,
    "init_weights_send_group_for_remote_instance": _REMOTE,
    "send_weights_to_remote_instance": _REMOTE,
    "get_remote_instance_transfer_engine_info": _REMOTE,
    "remote_instance_transfer_engine_info": _REMOTE,
    "release_memory_occupation": "weights that are given back cannot be loaded again into a server that runs",
    "resume_memory_occupation": "nothing of this server's memory can be given back",
    "load_lora_adapter_from_tensors": "tensors in a request are a Python pickle, which could run any code. "
    "/load_lora_adapter reads a folder",
    "attach_hicache_storage_backend": "a store for the cache could be any module, or write to any folder. Choose one "
    "at the start, by server.extra_args",
    "openai_v1_audio_transcriptions": "the model that is served reads text, no audio",
}
"""SGLang's endpoint function → why it is answered with 501."""

_FOLDER = "files would be written to any folder of the server's machine"
_PICKLES = f"{_FOLDER}, as pickles, with all that clients ask. SGLang's flags choose one at the start"
_PREFIX = f"as a part of a path, {_FOLDER}. SGLANG_TORCH_PROFILER_DIR chooses one at the start"
_OWN = "SGLang sets it by itself, and its scheduler ends of a value that it did not set"
_INTERNAL = dict.fromkeys(
    (
        *("lora_id", "positional_embed_overrides", "http_worker_ipc", "received_time", "return_bytes"),
        *("need_wait_for_mm_inputs", "num_items_assigned", "encoder_urls", "kv_hints", "decode_tp_size"),
        *("bootstrap_host", "bootstrap_port", "bootstrap_room", "bootstrap_pair_key", "disagg_prefill_dp_rank"),
        *("decision_layout", "token_indices_to_pool"),
    ),
    _OWN,
)
FIELDS: dict[str, dict[str, str]] = {
    "generate_request": _INTERNAL,
    "encode_request": _INTERNAL,
    "classify_request": _INTERNAL,
    "vertex_generate": _INTERNAL,
    "configure_logging": {"dump_requests_folder": _PICKLES, "crash_dump_folder": _PICKLES},
    "start_profile_async": {"output_dir": _PREFIX, "profile_prefix": _PREFIX, "profile_id": _PREFIX},
    "add_external_corpus": {"file_path": "any file of the server's machine would be read. Send documents"},
}
"""SGLang's endpoint function → fields of its body that name files or are not for clients, and why they are answered
with 400."""

RECORDING: dict[str, str] = {
    "start_expert_distribution_record_async": _RECORD,
    "stop_expert_distribution_record_async": _RECORD,
    "dump_expert_distribution_record_async": _RECORD,
}
"""The same, on a server that does not record experts."""

WITH_REPLICAS: dict[str, str] = {
    "unload_lora_adapter": "SGLang cannot unload adapters from a server with several replicas (server.dp)",
}
"""The same, on a server with several data-parallel replicas."""

OPEN_TO_ALL = frozenset({"load_lora_adapter", "unload_lora_adapter", "flush_cache"})
"""Of SGLang's endpoints for administrators, those that a server without any key offers: adapters come from folders that
its config allows, and the cache is flushed only while no request is running."""
FOR_ADMINISTRATORS = frozenset({"open_session", "close_session"})
"""Endpoints that SGLang offers to everybody, but our server only to administrators. The scheduler keeps each session
with all of its requests in memory until it is closed, their number is unbounded, and anybody may close another's."""
ADMIN_ONLY = (
    "it acts on what others ask, or on memory that all share, and this server has no key that says who may. Start it "
    "with server.admin_key=env:KT_LAUNCH_ADMIN_KEY, and send that key"
)
"""Why all others are answered with 403."""

AT_FAULT: Mapping[str, tuple[type[Exception], ...]] = {
    "parse_function_call_request": (ValueError,),
    "separate_reasoning_request": (ValueError,),
    "add_external_corpus": (ValueError, TypeError),
    "remove_external_corpus": (ValueError, AttributeError),
    "start_profile_async": (RuntimeError,),
    "stop_profile_async": (RuntimeError,),
    "vertex_generate": (TypeError,),
    "openai_v1_chat_completions": (AttributeError, TypeError),
    "sagemaker_chat_completions": (AttributeError, TypeError),
    "ollama_chat": (ValueError, TypeError, AttributeError, OverflowError),
    "ollama_generate": (ValueError, TypeError, AttributeError, OverflowError),
    "configure_logging": (ValueError,),
    "encode_request": (IndexError, TypeError),
    "classify_request": (IndexError, TypeError),
}
"""SGLang's endpoint function → exceptions that mean an invalid request, answered with 400."""

AT_FAULT_BY_PATH: Mapping[str, tuple[type[Exception], ...]] = {"/v1/loads": (ValueError,)}
"""The same for a route that SGLang's application does not list by itself."""
