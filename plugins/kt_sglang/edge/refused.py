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
    "openai_v1_audio_transcriptions": "the model that is served reads text, no audio",
}
"""SGLang's endpoint function → why it is answered with 501."""

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

AT_FAULT: Mapping[str, tuple[type[Exception], ...]] = {
    "parse_function_call_request": (ValueError,),
    "separate_reasoning_request": (ValueError,),
    "add_external_corpus": (ValueError, TypeError),
    "remove_external_corpus": (ValueError, AttributeError),
    "start_profile_async": (RuntimeError,),
    "stop_profile_async": (RuntimeError,),
    "vertex_generate": (TypeError,),
}
"""SGLang's endpoint function → exceptions that mean that the request is wrong, answered with 400."""
