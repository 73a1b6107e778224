"""Sampling parameters that a request leaves open: those of the model's generation_config.json, the same on all routes
of OpenAI's, Anthropic's and Ollama's. SGLang's own /generate takes none (docs/names.md).

Trigger: `--sampling-defaults model`, SGLang's default, which it obeys on chats only, and without `do_sample`. Safe
because what a request names goes first, and with `--sampling-defaults openai` there is nothing to add. Remove when
SGLang obeys generation_config.json on its other routes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

ALL_TOKENS = -1
"""SGLang's top_k for all tokens, which transformers has 0 for."""
TEMPERATURE = 1.0
"""OpenAI's default, on /v1/responses too, where SGLang has 0.7."""


def after_get_default_sampling_params(found: dict[str, Any], config: Any) -> dict[str, Any]:
    """AFTER hook of `ModelConfig.get_default_sampling_params`: `do_sample: false` is a temperature of 0, whatever
    temperature stands beside it, as in transformers."""
    if config.sampling_defaults != "model" or config.hf_generation_config is None:
        return found
    if config.hf_generation_config.do_sample is False:
        found = {**found, "temperature": 0.0}
    return {**found, "top_k": ALL_TOKENS} if found.get("top_k") == 0 else found


def around_completion_params(original: Callable[..., Any], serving: Any, request: Any) -> Any:
    """AROUND hook of `OpenAIServingCompletion._build_sampling_params`."""
    left = {name: value for name, value in defaults_of(serving).items() if name not in request.model_fields_set}
    return original(serving, request) | left


def for_responses(found: Mapping[str, Any] | None) -> dict[str, Any]:
    """The default parameters of /v1/responses. found: SGLang's."""
    return {"temperature": TEMPERATURE, **(found or {})}


def defaults_of(serving: Any) -> dict[str, Any]:
    """By SGLang's names. serving: SGLang's handler of a protocol."""
    return dict(serving.tokenizer_manager.model_config.get_default_sampling_params())
