"""Completions without a token, in process; tests/edge/test_served.py asks a server for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from kt_sglang.edge.requests import Refused
from kt_sglang.edge.scoring import NO_TOKEN, score_only, with_a_token, without_leftovers


@pytest.mark.parametrize(
    ("wanted", "sent", "none"), [(0, 1, True), (1, 1, False), (5, 5, False), ("x", "x", False), (False, False, False)]
)
def test_sglangs_form_gets_a_number_that_it_takes(wanted: Any, sent: Any, none: bool) -> None:
    assert with_a_token({"max_tokens": wanted, "prompt": "a"}) == ({"max_tokens": sent, "prompt": "a"}, none)
    assert with_a_token({"prompt": "a"}) == ({"prompt": "a"}, False)


def test_fewer_than_none_are_refused() -> None:
    with pytest.raises(Refused, match="max_tokens: got -1, expected at least 0") as refused:
        with_a_token({"max_tokens": -1})
    assert (refused.value.status, refused.value.param) == (400, "max_tokens")


def test_only_the_request_that_asks_for_none_gets_none() -> None:
    for none, got in ((False, 1), (True, 0)):
        token = NO_TOKEN.set(none)
        request = SimpleNamespace(sampling_params={"max_new_tokens": 1, "n": 2})
        score_only(request)
        NO_TOKEN.reset(token)
        assert request.sampling_params == {"max_new_tokens": got, "n": 2}


def test_nothing_is_left_of_a_token_that_was_not_asked_for() -> None:
    prompt = {"input_token_logprobs": [[-1.0, 5, "a"]], "prompt_tokens": 1}
    output = {"output_token_logprobs": [[-2.0, 6, "b"]], "output_top_logprobs": [[]], "output_token_logprobs_length": 1}
    ended = {"finish_reason": {"type": "length"}, "completion_tokens": 0}
    cut = {"output_token_logprobs": [], "output_top_logprobs": [], "output_token_logprobs_length": 0}
    whole = {"text": "", "output_ids": [6], "meta_info": prompt | output | ended}
    bare = {"text": "", "output_ids": [], "meta_info": prompt | cut | ended}
    others = [
        {"meta_info": prompt | output | ended | more} for more in ({"completion_tokens": 1}, {"finish_reason": None})
    ]

    async def answers() -> AsyncIterator[Any]:
        for part in (whole, [whole, whole], *others):
            yield part

    async def collect() -> list[Any]:
        return [part async for part in without_leftovers(answers())]

    assert asyncio.run(collect()) == [bare, [bare, bare], *others]
