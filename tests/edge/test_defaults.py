"""What a request gets that it leaves open: of SGLang's own classes, without a server. What clients get is shown by
test_real_files.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig

from kt_sglang.edge.defaults import after_get_default_sampling_params, around_completion_params, for_responses
from kt_sglang.edge.ollama import around_convert_options, messages_of
from kt_sglang.without_gpu import torchvision_shim

WARM = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}


def defaults(config: dict[str, Any] | None, wanted: str = "model") -> dict[str, Any]:
    """From the content of a generation_config.json, None for no such file."""
    torchvision_shim.install_if_needed()
    from sglang.srt.configs.model_config import ModelConfig

    read = None if config is None else GenerationConfig(**config)
    model = SimpleNamespace(sampling_defaults=wanted, hf_generation_config=read)
    return after_get_default_sampling_params(ModelConfig.get_default_sampling_params(model), model)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, {}),
        ({}, {}),
        ({"do_sample": True, **WARM}, WARM),
        (WARM, WARM),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": False, **WARM}, WARM | {"temperature": 0.0}),
        ({"do_sample": True, "top_k": 0}, {"top_k": -1}),
    ],
)
def test_generation_config_is_meant_as_transformers_means_it(config: Any, expected: dict[str, Any]) -> None:
    assert defaults(config) == expected
    assert defaults(config, "openai") == {}


def test_what_a_completion_names_goes_first() -> None:
    torchvision_shim.install_if_needed()
    from sglang.srt.entrypoints.openai.protocol import CompletionRequest
    from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion

    model = SimpleNamespace(get_default_sampling_params=lambda: dict(WARM))
    serving = SimpleNamespace(tokenizer_manager=SimpleNamespace(model_config=model))
    build = OpenAIServingCompletion._build_sampling_params
    for named in ({}, {"temperature": 1.0}, {"top_p": 1.0, "repetition_penalty": 1.3}):
        made = around_completion_params(build, serving, CompletionRequest(model="m", prompt="Hi", **named))
        assert {name: made[name] for name in WARM} == WARM | named


def test_what_an_option_of_ollamas_names_goes_first() -> None:
    torchvision_shim.install_if_needed()
    from sglang.srt.entrypoints.ollama.serving import OllamaServing

    model = SimpleNamespace(get_default_sampling_params=lambda: dict(WARM))
    serving = SimpleNamespace(tokenizer_manager=SimpleNamespace(model_config=model))
    convert = OllamaServing._convert_options_to_sampling_params
    asked = {"temperature": 1.0, "repeat_penalty": 1.3, "top_p": None, "num_predict": None}
    made = around_convert_options(convert, serving, asked)
    assert {name: made[name] for name in WARM} == {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.3}
    assert made["max_new_tokens"] is around_convert_options(convert, serving)["max_new_tokens"] is None


def test_a_response_has_the_temperature_of_other_routes() -> None:
    assert for_responses(None) == for_responses({}) == {"temperature": 1.0}
    assert for_responses(WARM) == WARM


HI, BRIEF = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be short"}


@pytest.mark.parametrize(
    ("asked", "template", "expected"),
    [
        ({"prompt": "Hi"}, "t", [HI]),
        ({"prompt": "Hi", "system": "Be short"}, "t", [BRIEF, HI]),
        ({"prompt": "Hi", "raw": True}, "t", None),
        ({"prompt": "Hi", "system": "Be short"}, None, None),
        ({"prompt": " ", "system": "Be short"}, "t", None),
    ],
)
def test_a_prompt_of_ollamas_is_put_into_the_template_if_there_is_one(asked: Any, template: Any, expected: Any) -> None:
    torchvision_shim.install_if_needed()
    from sglang.srt.entrypoints.ollama.protocol import OllamaGenerateRequest

    manager = SimpleNamespace(chat_template_name=None, python_chat_template=None)
    tokenizer = SimpleNamespace(tokenizer=SimpleNamespace(chat_template=template))
    chat = SimpleNamespace(template_manager=manager, tokenizer_manager=tokenizer)
    assert messages_of(OllamaGenerateRequest(model="m", **asked), chat) == expected
