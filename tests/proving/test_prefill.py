"""What a start makes of the schedulers' findings about experts that come to the GPU for long prompts. The server is a
stand-in that answers as SGLang does: no machine of the tests has a card."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from kt_launch.proving.prefill import PrefillProof, prove_prefill
from kt_model.errors import ProofFailed
from kt_model.plan import LaunchPlan, Resolved

MEASURED = [[1024, 15.0, 20.0], [2048, 30.0, 20.0]]


class Server:
    """Its ranks' findings; `computes`: the share of a long prompt that is computed on the GPU."""

    def __init__(self, *states: str, computes: float = 1.0, tokens: int = 1376, longest: int = 40000) -> None:
        self.ranks = [self._rank(state, tokens) for state in states]
        self.computes, self.longest = computes, longest
        self.prompts: list[tuple[int, str | None]] = []

    @staticmethod
    def _rank(state: str, tokens: int) -> dict[str, Any]:
        why = "measured, a layer both ways" if state == "on" else "layer 2 differs from kt_kernels by 1.4"
        errors = {"base": 0.005, "3fa1": 0.006, "77b2": 0.007}
        ran = {"tokens_ran": 0, "adapter_tokens_ran": 0, "bytes": 0, "buffer_bytes": 1 << 29}
        return {
            "state": state,
            "why": why,
            "tokens": tokens,
            "measured": MEASURED,
            "between_ms": 2.5,
            "link_gb_s": 55.0,
            "errors": errors,
        } | ran

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/server_info":
            first, *others = ({"gpu_prefill": rank} for rank in self.ranks)
            return httpx.Response(200, json={"internal_states": [{"kt_launch": {**first, "others": others}}]})
        if request.url.path == "/flush_cache":
            return httpx.Response(200)
        return self._generate(json.loads(request.content))

    def _generate(self, body: dict[str, Any]) -> httpx.Response:
        ids = body.get("input_ids")
        if ids is None:
            read = [[None, token, None] for token in range(20)]
            return httpx.Response(200, json={"meta_info": {"input_token_logprobs": read}})
        if len(ids) > self.longest:
            return httpx.Response(400)
        self.prompts.append((len(ids), body.get("lora_path")))
        for rank in self.ranks:
            rank["tokens_ran"] += int(len(ids) * self.computes)
            rank["adapter_tokens_ran"] += int(len(ids) * self.computes) if "lora_path" in body else 0
        return httpx.Response(200, json={})


def proven(server: Server, wanted: Any = "auto", context: int | None = None) -> PrefillProof | None:
    values = {
        "kt.gpu_prefill_tokens": wanted,
        "server.context_length": context,
        "lora.attention.path": "/a",
        "lora.attention.expert_pairs": 0,
        "lora.west.path": "/b",
        "lora.west.expert_pairs": 8,
        "lora.east.path": "/c",
        "lora.east.reaches": "8 routed expert",  # as plans had it before they counted
    }
    plan = LaunchPlan({}, {key: Resolved(value, "test") for key, value in values.items()}, (), {}, ())
    with httpx.Client(transport=httpx.MockTransport(server), base_url="http://server") as client:
        return prove_prefill(plan, client)


def test_what_was_shown_and_ran_is_told() -> None:
    server = Server("on", "on")
    found = proven(server)
    assert found is not None
    assert found.lines() == [
        "from 1376 tokens on, experts come to the GPU (measured, a layer both ways); they give there what kt_kernels "
        "gives: relative L2 difference base 5.0e-03, adapters 7.0e-03; it ran: base 1377 tokens, west 1377 tokens"
    ]
    assert server.prompts == [(1377, None), (1377, "west")]


@pytest.mark.parametrize("states", [("off",), ("on", "off"), ("proving",)])
def test_a_difference_leaves_it_off_with_a_warning_and_a_typed_number_ends_the_start(states: tuple[str, ...]) -> None:
    found = proven(Server(*states))
    assert found is not None
    assert found.lines() == ["warning: kt.gpu_prefill_tokens: off: layer 2 differs from kt_kernels by 1.4"]
    with pytest.raises(ProofFailed, match=r"kt\.gpu_prefill_tokens: 700, but it cannot be used: layer 2 differs"):
        proven(Server(*states), wanted=700)


def test_a_long_prompt_that_the_cpu_computed_all_the_same_ends_the_start() -> None:
    with pytest.raises(ProofFailed, match=r"688 of 1376 tokens of base were computed on the GPU\. Set .*=off"):
        proven(Server("on", computes=0.5))


@pytest.mark.parametrize(
    ("server", "context"),
    [(Server("on", tokens=20000), None), (Server("on"), 1024), (Server("on", longest=1000), None)],
    ids=["far", "context", "refused"],
)
def test_no_longer_prompt_is_sent_than_the_server_takes(server: Server, context: int | None) -> None:
    found = proven(server, context=context)
    assert found is not None and found.ran == {} and server.prompts == []


def test_who_wants_none_of_it_is_not_asked() -> None:
    assert proven(Server(), wanted="off") is None
