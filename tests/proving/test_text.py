"""What a shipped text says of a server: no numbers, a head that knows nothing, a model that does not read."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import pytest

from kt_launch.proving import content
from kt_launch.proving.agreement import Agreement, Worst
from kt_launch.proving.text import predict_all
from kt_launch.proving.whole_model import Findings
from kt_model.errors import ProofFailed
from kt_model.plan import LaunchPlan, Resolved

SWING = 0.5
"""Nats by which the made-up logprobs of neighbouring tokens differ."""


def plan(text: str = "demand") -> LaunchPlan:
    values = {"model.name": "tiny", "server.context_length": 128, "server.max_total_tokens": None}
    resolved = {key: Resolved(value, "") for key, value in values.items()}
    return LaunchPlan({"proof": {"text": text}}, resolved, (), {}, ())


def server(gain: float, top: list[float | None] | None = None, asked: list[Any] | None = None) -> httpx.Client:
    """Finds every token of a text at -4 nats, up and down by SWING, and any other by the gain less likely."""

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content or b"{}")
        if request.url.path == "/tokenize":
            return httpx.Response(200, json={"tokens": [list(text.encode()) for text in body["prompt"]]})
        if asked is not None:
            asked.append(body)
        row = [[logprob, token, None] for token, logprob in enumerate(top or [-1.0, -3.0])]
        others = [[-4.0 - gain, token, None] for token in body.get("token_ids_logprob", [])]
        found = [
            {
                "input_token_logprobs": [[None, 0, None], *map(given, range(len(prompt) - 1), prompt[1:])],
                "input_top_logprobs": [None, *(row for _ in prompt[1:])],
                "output_top_logprobs": [row],
                "input_token_ids_logprobs": [None, *(others for _ in prompt[1:])],
                "output_token_ids_logprobs": [others],
            }
            for prompt in body.get("input_ids", [])
        ]  # fmt: skip
        return httpx.Response(200, json=[{"meta_info": one} for one in found])

    return httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer))


def given(place: int, token: int) -> list[Any]:
    return [-4.0 + SWING * (-1) ** place, token, None]


class Unasked:
    """A float32 run that checked nothing, or one that vouches for the base."""

    def __init__(self, vouches: bool = False) -> None:
        right = Agreement(720, {"50%": 0.02}, {"50%": 0.06}, 0.02, "", Worst(0, 0, -1.0, -1.1))
        self.findings = Findings({"base": right}) if vouches else Findings(unchecked={"base": "too large"})

    def check(self, client: httpx.Client, replicas: int) -> Findings:
        return self.findings


def prove(made: LaunchPlan, client: httpx.Client, vouches: bool = False) -> content.Content:
    return content.prove_content(made, client, Unasked(vouches))  # type: ignore[arg-type]


def test_tokens_of_passages_cut_to_the_context_are_held_against_others_of_the_text() -> None:
    asked: list[Any] = []
    found = predict_all(server(1.25, asked=asked), plan(), ["base", "west"])
    assert {side: (round(one.nats, 2), round(one.gain, 2)) for side, one in found.items()} == {
        "base": (4.0, 1.25),
        "west": (4.0, 1.25),
    }
    questions = [body for body in asked if "input_ids" in body]
    assert [body.get("lora_path") for body in questions] == [None, "west"]
    assert [len(tokens) for tokens in questions[0]["input_ids"]] == [120] * 3
    text = {token for tokens in questions[0]["input_ids"] for token in tokens}
    assert len(questions[0]["token_ids_logprob"]) > 15 and set(questions[0]["token_ids_logprob"]) <= text
    assert found["base"].tokens == 3 * 119
    assert found["base"].deviation == pytest.approx(SWING / math.sqrt(3 * 119), rel=0.01)


@pytest.mark.parametrize("broken", [None, -1e39])
def test_logprobs_that_are_no_numbers_fail_whoever_vouches(broken: float | None) -> None:
    with pytest.raises(ProofFailed, match=r"proof: 360 of 360 positions .* logprobs that are not numbers"):
        prove(plan(), server(5.0, [-1.0, broken]), vouches=True)


def test_a_head_for_which_all_tokens_are_the_same_fails() -> None:
    with pytest.raises(ProofFailed, match="every token is as probable as any other"):
        prove(plan(), server(5.0, [-6.2] * 20), vouches=True)


def test_a_model_that_does_not_read_fails_unless_it_is_known_to_be_so_or_let_through() -> None:
    guessing = server(0.02)
    with pytest.raises(ProofFailed) as failure:
        prove(plan(), guessing)
    message = str(failure.value)
    assert message.startswith(
        "proof: the base predicts a shipped text no better than by chance: its tokens are 0.02 nats"
    )
    assert "expected above 0.08" in message and "not compared with transformers: too large" in message
    assert "proof.text=warn serves it" in message
    assert failure.value.exit_code == 4
    (line,) = [line for line in prove(plan("warn"), guessing).lines() if "reads" in line or "does not read" in line]
    assert line.startswith("warning: base does not read: tokens of a shipped text are 0.02 nats likelier")
    (line,) = [line for line in prove(plan(), guessing, vouches=True).lines() if "does not read" in line]
    assert line.startswith("base does not read")


def test_a_model_that_reads_passes_and_the_numbers_are_kept() -> None:
    found = prove(plan(), server(0.1))
    assert found.as_dict()["text"]["base"]["gain"] == pytest.approx(0.1, abs=0.01)
    assert found.as_dict()["whole_model"]["unchecked"] == {"base": "too large"}
    assert "whole model: base not compared with transformers: too large" in found.lines()
