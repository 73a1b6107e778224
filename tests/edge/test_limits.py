"""What of a request is refused before SGLang reads it: in process, on SGLang's own classes. What clients see is shown
on a server by test_served.py.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from kt_sglang.edge.limits import (
    around_handle_parallel_sampling,
    around_validate_one_request,
    require_one_of_each,
    require_sampling,
    sound_answers,
)
from kt_sglang.without_gpu import torchvision_shim

FINE: list[dict[str, Any]] = [
    {"text": "a"},
    {"text": "a", "rid": "r", "sampling_params": {"n": 2}, "top_logprobs_num": 2},
    {"text": "a", "rid": ["r"], "sampling_params": {"n": 2}},
    {"text": ["a", "b"], "rid": ["r", "s"], "sampling_params": [{}, {}], "return_logprob": [True, False]},
    {"text": ["a", "b"], "rid": "r", "sampling_params": {}},
    {"text": ["a", "b"], "return_hidden_states": [False, False], "extra_key": ["k", "l"], "logprob_start_len": [0, -1]},
    {"input_ids": [1, 2], "rid": "r"},
    {"input_ids": [[1], [2]], "rid": ["r", "s"]},
    {"input_embeds": [[0.5], [0.5]], "rid": "r"},
    {"input_embeds": [[[0.5]], [[0.5]]], "rid": ["r", "s"]},
]
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"text": "a", "rid": ["r"]}, "rid: got a list of 1, expected one value for one prompt."),
    ({"input_ids": [1, 2], "rid": []}, "rid: got a list of 0, expected one value for one prompt."),
    ({"text": "a", "sampling_params": []}, "sampling_params: got a list of 0, expected one value for one prompt."),
    ({"text": "a", "sampling_params": [{}]}, "sampling_params: got a list of 1, expected one value for one prompt."),
    ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params: got a list of 1, expected a list of 2, one for"),
    ({"text": ["a", "b"], "sampling_params": [{}, []]}, "sampling_params: expected an object for each prompt."),
    ({"text": "a", "top_logprobs_num": [1]}, "top_logprobs_num: got a list of 1, expected one value for one prompt."),
    ({"text": "a", "return_hidden_states": []}, "return_hidden_states: got a list of 0, expected one value for one"),
    ({"text": "a", "extra_key": ["k"]}, "extra_key: got a list of 1, expected one value for one prompt."),
    ({"text": ["a"], "rid": ["r", "s"]}, "rid: got a list of 2, expected a list of 1, one for each prompt."),
]


def asked(**fields: Any) -> Any:
    torchvision_shim.install_if_needed()
    from sglang.srt.managers.io_struct import GenerateReqInput

    return GenerateReqInput(**fields)


@pytest.mark.parametrize("fields", FINE, ids=str)
def test_what_sglang_takes_passes(fields: dict[str, Any]) -> None:
    request = asked(**fields)
    require_one_of_each(request)
    request.normalize_batch_and_arguments()


@pytest.mark.parametrize(("fields", "said"), WRONG, ids=str)
def test_a_list_stands_for_a_list_of_prompts(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        require_one_of_each(asked(**fields))


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"top_logprobs_num": 20}, None),
        ({"top_logprobs_num": 1024, "sampling_params": {"max_new_tokens": 1024}}, None),
        ({"top_logprobs_num": 1024, "sampling_params": {"max_new_tokens": 1025}}, 1025),
        ({"top_logprobs_num": 1024, "sampling_params": {"max_new_tokens": 900}, "logprob_start_len": 0}, 1900),
        ({"top_logprobs_num": 1024, "sampling_params": {"max_new_tokens": None}}, 3096),
        ({"top_logprobs_num": 1024, "sampling_params": {"max_new_tokens": 10**9}}, 3096),
        ({"top_logprobs_num": 1024}, None),
    ],
    ids=str,
)
def test_logprobs_of_an_answer_are_bounded(fields: dict[str, Any], tokens: int | None) -> None:
    """They would take all memory of the process that everybody is answered by."""
    config = SimpleNamespace(vocab_size=1024, context_len=4096, is_multimodal=False)
    request = SimpleNamespace(**{"sampling_params": {}, "logprob_start_len": -1, **fields})
    manager, prompt = SimpleNamespace(model_config=config), [1] * 1000
    if tokens is None:
        assert around_validate_one_request(lambda *_: "kept", manager, request, prompt) == "kept"
    else:
        with pytest.raises(ValueError, match=f"got 1024 for up to {tokens} tokens, expected at most 1048576"):
            around_validate_one_request(lambda *_: "kept", manager, request, prompt)


@pytest.mark.parametrize(("start", "taken"), [(-1, True), (0, True), (-2, False), (-(2**31), False)])
def test_logprobs_begin_in_the_prompt(start: int, taken: bool) -> None:
    """SGLang's scheduler ends of a place before it."""
    config = SimpleNamespace(vocab_size=1024, context_len=4096, is_multimodal=False)
    manager, request = SimpleNamespace(model_config=config), SimpleNamespace(logprob_start_len=start)
    if taken:
        assert around_validate_one_request(lambda *_: "kept", manager, request, [1] * 9) == "kept"
    else:
        with pytest.raises(ValueError, match=f"logprob_start_len: got {start}, expected a place in the prompt"):
            around_validate_one_request(lambda *_: "kept", manager, request, [1] * 9)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([[0.5] * 128] * 3, None),
        ([[0.5] * 128, [0.5] * 127], "input_embeds: row 1 has 127, expected 128 numbers, the hidden size."),
        ([[0.5] * 129], "input_embeds: row 0 has 129, expected 128 numbers"),
        ([0.5] * 128, "input_embeds: row 0 has no list, expected 128 numbers"),
        ([[0.5] * 128] * 4096, "input_embeds: got 4096 rows, expected 1 to 4095, the context."),
        ([], "input_embeds: got 0 rows"),
    ],
    ids=["fine", "second short", "long", "flat", "too many", "none"],
)
def test_embeddings_are_as_wide_as_the_model(rows: list[Any], said: str | None) -> None:
    """SGLang's scheduler ends of others, on a server with --disable-radix-cache, which takes them."""
    config = SimpleNamespace(vocab_size=1024, context_len=4096, hidden_size=128, is_multimodal=False)
    manager, request = SimpleNamespace(model_config=config), SimpleNamespace(input_embeds=rows)
    if said is None:
        assert around_validate_one_request(lambda *_: "kept", manager, request, None) == "kept"
    else:
        with pytest.raises(ValueError, match=re.escape(said)):
            around_validate_one_request(lambda *_: "kept", manager, request, None)


def test_counts_are_whole_numbers() -> None:
    """Ollama's options come as they were sent, and SGLang's scheduler cuts a list of tokens at max_new_tokens."""
    params = {"max_new_tokens": 16.0, "top_k": 5.0, "temperature": 1.0, "min_new_tokens": 2}
    require_sampling(params, 1024)
    assert [type(params[name]) for name in ("max_new_tokens", "top_k", "min_new_tokens")] == [int] * 3
    assert params == {"max_new_tokens": 16, "top_k": 5, "temperature": 1.0, "min_new_tokens": 2}
    for number in (1.5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"max_new_tokens: got {number}, expected a whole number."):
            require_sampling({"max_new_tokens": number}, 1024)


@pytest.mark.parametrize(("sent", "taken"), [(0, -1), (0.0, -1), (-1, -1), (1, 1)])
def test_a_top_k_of_zero_is_none(sent: float, taken: int) -> None:
    params = {"top_k": sent}
    require_sampling(params, 1024)
    assert params == {"top_k": taken}


def test_answers_of_all_prompts_together_are_bounded() -> None:
    torchvision_shim.install_if_needed()
    kept = around_handle_parallel_sampling(lambda _: "kept", asked(text=["a"] * 16, sampling_params={"n": 128}))
    assert kept == "kept"
    for sampling in ({"n": 128}, [{"n": 1}] * 16 + [{"n": 128}]):
        with pytest.raises(ValueError, match="got 128 for 17 prompts, expected at most 2048 answers in all"):
            around_handle_parallel_sampling(len, asked(text=["a"] * 17, sampling_params=sampling))


def test_grammars_and_biases_are_bounded() -> None:
    require_sampling({"regex": "a" * 60000, "logit_bias": {"5": -1e9, "6": 100}, "top_k": -1, "stop_token_ids": [5]}, 6)
    for params, said in (
        ({"json_schema": "x" * 70000}, "json_schema: it has 70000 characters, expected at most 65536."),
        ({"logit_bias": {"5": 1e308}}, "logit_bias: got 1e\\+308 for token 5, expected a number up to 1e\\+30."),
        ({"logit_bias": {"5": "x"}}, "logit_bias: got x for token 5"),
        ({"logit_bias": {"x": 5}}, "logit_bias: got 'x', expected the id of a token as a key."),
        ({"logit_bias": {"-1": 5}}, "logit_bias: got '-1', expected the id of a token as a key."),
    ):
        with pytest.raises(ValueError, match=said):
            require_sampling(params, 1024)


def test_words_of_a_grammar_do_not_count() -> None:
    said = "d" * 3000
    part: dict[str, Any] = {"type": "object", "description": said, "properties": {"title": {"type": "string"}}}
    kept: dict[str, Any] = {"type": "object", "properties": {"title": {"type": "string"}}}
    values = {"enum": [{"title": "t"}], "default": {"description": "e"}}
    for name in ("json_schema", "structural_tag"):
        params = {name: json.dumps({"structures": [{"begin": "ö", "schema": {"a": [part] * 40}}], **values})}
        require_sampling(params, 1024)
        assert json.loads(params[name]) == {"structures": [{"begin": "ö", "schema": {"a": [kept] * 40}}], **values}
    with pytest.raises(ValueError, match=r"json_schema: it has \d+ characters, expected at most 65536"):
        require_sampling({"json_schema": json.dumps([part] * 2000)}, 1024)
    short = {"json_schema": json.dumps(part)}
    require_sampling(short, 1024)
    assert short == {"json_schema": json.dumps(part)}


def test_what_cannot_be_read_is_the_fault_of_the_request_until_it_is_answered() -> None:
    async def fails(after: int) -> AsyncIterator[int]:
        for number in range(after):
            yield number
        raise TypeError("unhashable type: 'list'")

    async def collect(after: int) -> list[int]:
        return [part async for part in sound_answers(asked(text="a"), fails(after))]

    with pytest.raises(ValueError, match=r"a field of the request has a value that it cannot have \(TypeError: unhash"):
        asyncio.run(collect(0))
    with pytest.raises(TypeError):
        asyncio.run(collect(1))


def test_what_the_scheduler_refuses_is_refused_before_a_stream_begins() -> None:
    """But not what fails in it, or once an answer has begun."""

    async def answers(*parts: Any) -> AsyncIterator[Any]:
        for part in parts:
            yield part

    async def collect(*parts: Any) -> list[Any]:
        return [part async for part in sound_answers(asked(text="a"), answers(*parts))]

    def aborted(status: int) -> dict[str, Any]:
        return {"meta_info": {"finish_reason": {"type": "abort", "status_code": status, "message": "no grammar"}}}

    with pytest.raises(ValueError, match="no grammar"):
        asyncio.run(collect(aborted(400)))
    begun: Any = {"meta_info": {"finish_reason": None}}
    kept: list[list[Any]] = [[aborted(500)], [begun, aborted(400)], [[begun]], [{}]]
    for parts in kept:
        assert asyncio.run(collect(*parts)) == parts
