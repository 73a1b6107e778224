"""What a shipped text says of a server: numbers that are none, a head that knows nothing, a model that predicts
nothing.
"""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import pytest

from kt_launch.errors import ProofFailed
from kt_launch.plan import LaunchPlan, Resolved
from kt_launch.proving import content
from kt_launch.proving.agreement import Agreement, Worst
from kt_launch.proving.text import predict_all
from kt_launch.proving.whole_model import Findings

VOCABULARY = 512
CHANCE = math.log(VOCABULARY)


def plan(text: str = "demand", vocabulary: int = VOCABULARY) -> LaunchPlan:
    values = {"model.name": "tiny", "server.context_length": 128, "server.max_total_tokens": None}
    resolved = {key: Resolved(value, "") for key, value in {**values, "model.vocab_size": vocabulary}.items()}
    return LaunchPlan({"proof": {"text": text}}, resolved, (), {}, ())


def server(given: float | None, top: list[float | None], asked: list[Any] | None = None) -> httpx.Client:
    """Gives every token of a text this logprob, and lists these as the most probable ones."""

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content or b"{}")
        if request.url.path == "/tokenize":
            return httpx.Response(200, json={"tokens": [list(text.encode()) for text in body["prompt"]]})
        if asked is not None:
            asked.append(body)
        row = [[logprob, token, None] for token, logprob in enumerate(top)]
        found = [
            {
                "input_token_logprobs": [[None, 0, None], *([given, token, None] for token in prompt[1:])],
                "input_top_logprobs": [None, *(row for _ in prompt[1:])],
                "output_top_logprobs": [row],
            }
            for prompt in body.get("input_ids", [])
        ]
        return httpx.Response(200, json=[{"meta_info": one} for one in found])

    return httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer))


class Unasked:
    """A float32 run that checked nothing, or one that vouches for the base."""

    def __init__(self, vouches: bool = False) -> None:
        right = Agreement(720, {"50%": 0.02}, {"50%": 0.06}, 0.02, "", Worst(0, 0, -1.0, -1.1))
        self.findings = Findings({"base": right}) if vouches else Findings(unchecked={"base": "too large"})

    def check(self, client: httpx.Client, replicas: int) -> Findings:
        return self.findings


def prove(made: LaunchPlan, client: httpx.Client, vouches: bool = False) -> content.Content:
    return content.prove_content(made, client, Unasked(vouches))  # type: ignore[arg-type]


def test_nats_are_the_mean_over_the_tokens_of_passages_cut_to_the_context() -> None:
    asked: list[Any] = []
    found = predict_all(server(-2.5, [-1.0, -3.0], asked), plan(), ["base", "west"])
    assert {side: one.nats for side, one in found.items()} == {"base": 2.5, "west": 2.5}
    assert [body.get("lora_path") for body in asked if "input_ids" in body] == [None, "west"]
    lengths = [len(tokens) for tokens in asked[1]["input_ids"]]
    assert lengths == [120] * 3
    assert found["base"].tokens == sum(lengths) - 3
    assert found["base"].chance == pytest.approx(CHANCE)


@pytest.mark.parametrize("broken", [None, float("-inf")])
def test_logprobs_that_are_no_numbers_fail_whoever_vouches(broken: float | None) -> None:
    client = server(-1.0, [-1.0, broken]) if broken is None else server(-1.0, [-1.0, -1e39])
    with pytest.raises(ProofFailed, match=r"proof: 360 of 360 positions .* logprobs that are no numbers"):
        prove(plan(), client, vouches=True)


def test_a_head_for_which_all_tokens_are_the_same_fails() -> None:
    with pytest.raises(ProofFailed, match="every token is as probable as any other"):
        prove(plan(), server(-CHANCE, [-CHANCE] * 20), vouches=True)


def test_a_model_that_predicts_nothing_fails_unless_it_is_known_to_be_so_or_let_through() -> None:
    guessing = server(-CHANCE, [-5.0, -7.0])
    with pytest.raises(ProofFailed) as failure:
        prove(plan(), guessing)
    told = str(failure.value)
    assert told.startswith("proof: the base predicts a shipped text with 6.24 nats a token, expected below 4.68")
    assert "not held against transformers: too large" in told and "proof.text=warn serves it" in told
    assert failure.value.exit_code == 4
    (line,) = [line for line in prove(plan("warn"), guessing).lines() if "predicts" in line]
    assert line.startswith("warning: base predicts a shipped text with 6.24 nats")
    (line,) = [line for line in prove(plan(), guessing, vouches=True).lines() if line.startswith("base predicts")]
    assert line.endswith("it has not learnt such text")


def test_a_model_that_predicts_passes_and_the_numbers_are_kept() -> None:
    found = prove(plan(), server(-3.0, [-1.0, -4.0]))
    assert found.as_dict()["text"]["base"]["nats_a_token"] == 3.0
    assert found.as_dict()["whole_model"]["unchecked"] == {"base": "too large"}
    assert "whole model: base not held against transformers: too large" in found.lines()


def test_without_a_vocabulary_nothing_is_asked_and_that_is_said() -> None:
    found = prove(plan(vocabulary=0), server(-3.0, [-1.0, -4.0]))
    assert found.texts == {}
    assert "no text was predicted: config.json does not say vocab_size" in found.lines()
