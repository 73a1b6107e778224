"""What of a request is refused before SGLang reads it: in process, on SGLang's own classes. What clients see is shown
on a server by test_served.py.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kt_sglang.edge.limits import require_one_of_each, require_sampling, sound_answers
from kt_sglang.without_gpu import torchvision_shim

FINE: list[dict[str, Any]] = [
    {"text": "a"},
    {"text": "a", "rid": "r", "sampling_params": {"n": 2}, "top_logprobs_num": 2},
    {"text": "a", "rid": ["r"], "sampling_params": {"n": 2}},
    {"text": ["a", "b"], "rid": ["r", "s"], "sampling_params": [{}, {}], "return_logprob": [True, False]},
    {"text": ["a", "b"], "rid": "r", "sampling_params": {}},
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


def test_grammars_and_biases_are_bounded() -> None:
    require_sampling({"regex": "a" * 60000, "logit_bias": {"5": -1e9, "6": 100}})
    for params, said in (
        ({"json_schema": "x" * 70000}, "json_schema: it has 70000 characters, expected at most 65536."),
        ({"logit_bias": {"5": 1e308}}, "logit_bias: got 1e\\+308 for token 5, expected a number up to 1e\\+30."),
        ({"logit_bias": {"5": "x"}}, "logit_bias: got x for token 5"),
    ):
        with pytest.raises(ValueError, match=said):
            require_sampling(params)


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
