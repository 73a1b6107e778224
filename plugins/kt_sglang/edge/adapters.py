"""Which adapters requests may name at this moment, and how the named one reaches SGLang's engine.

SGLang keeps two lists: its registry of loaded adapters, and every adapter that was ever loaded, from which it silently
reloads one that it had evicted (--max-loaded-loras). The second list counts here, and an adapter that is unloaded is
removed from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from kt_sglang.edge.answers import told
from kt_sglang.edge.limits import sound_answers
from kt_sglang.edge.names import Meaning, Names
from kt_sglang.edge.run_state import remember_adapters
from kt_sglang.edge.scoring import score_only

ASKED: ContextVar[Meaning | None] = ContextVar("asked", default=None)
"""The model or adapter of the HTTP request in progress; None if it names none, or one in each row."""


@dataclass(frozen=True)
class Served:
    """paths: of the adapters, by name."""

    base: str
    context_length: int
    paths: Mapping[str, str]

    @property
    def names(self) -> Names:
        """The names that requests may use."""
        return Names(self.base, self.paths)


def read_served() -> Served:
    """What this process serves now."""
    from sglang.srt.entrypoints.http_server import get_global_state

    manager = get_global_state().tokenizer_manager
    adapters = dict(manager.lora_ref_cache) if manager.enable_lora else {}
    paths = {name: reference.lora_path for name, reference in adapters.items()}
    return Served(manager.served_model_name, manager.model_config.context_len, paths)


def around_generate_request(original: Callable[..., Any], manager: Any, request: Any, *others: Any, **more: Any) -> Any:
    """AROUND hook of `TokenizerManager.generate_request`, which all routes use: sets the adapter that the HTTP request
    names. On many routes (responses, Ollama's, score) SGLang would omit it. Raises ValueError for an invalid request,
    which SGLang answers with 400."""
    asked = ASKED.get()
    if asked is not None and asked.adapter is not None and not isinstance(request.lora_path, list):
        request.lora_path = asked.adapter
    score_only(request)
    return told(request, sound_answers(request, original(manager, request, *others, **more)))


def around_parse_model_parameter(original: Callable[..., Any], serving: Any, model: str) -> Any:
    """AROUND hook of `OpenAIServingBase._parse_model_parameter`: a resolved name is not parsed again. On some routes,
    SGLang refuses adapters' names, which it does not support there."""
    return original(serving, model) if ASKED.get() is None else (serving.tokenizer_manager.served_model_name, None)


async def around_unload_lora_adapter(original: Callable[..., Any], manager: Any, request: Any, *others: Any) -> Any:
    """AROUND hook of `TokenizerManager.unload_lora_adapter`: the adapter is forgotten before it is unloaded. SGLang
    would remember its path, and a request that names it, even during the unloading, would reload it from there."""
    from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqOutput

    name, cache = request.lora_name, manager.lora_ref_cache
    known, registered = cache.pop(name, None), manager.lora_registry.get_all_adapters
    if known is not None and name not in registered() and name not in manager.pending_lora_unloads:
        left = {other: reference.lora_path for other, reference in cache.items()}
        remember_adapters(left)
        return UnloadLoRAAdapterReqOutput(success=True, loaded_adapters=left)
    try:
        return await original(manager, request, *others)
    finally:
        if known is not None and registered().get(name) == known:
            cache[name] = known
        remember_adapters({other: reference.lora_path for other, reference in cache.items()})
