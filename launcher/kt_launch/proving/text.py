"""How well a server predicts a shipped text: the check that a model of any size can take. Decides what of it is a
failure.

A model that was trained on English predicts such a text with 2 to 5 nats a token, whatever its vocabulary of V tokens;
a uniform guess has ln V (10 for 32,000 tokens, 12 for 150,000). BOUND of ln V lies between the two with room on both
sides. A checkpoint of random weights is above it by right, and so is a model that learnt little: where the whole model
was held against transformers, that is what counts, and the number is only told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from kt_launch.bench.quality import passages
from kt_launch.errors import ProofFailed
from kt_launch.plan import LaunchPlan
from kt_launch.proving.asking import Answer, ask, room

KEY = "proof.text"
PASSAGES = 3
"""Of the shipped text: 250 tokens of a usual vocabulary."""
BOUND = 0.75
"""Of ln V: nats a token above which nothing is predicted."""
UNTOLD = "config.json does not say vocab_size"
LEAST_SPREAD = 1e-3
"""Nats between the first and the last of the most probable tokens, below which all are the same."""


@dataclass(frozen=True)
class Prediction:
    """Mean nats a token, over so many tokens; chance: of a uniform guess."""

    nats: float
    tokens: int
    chance: float

    @property
    def sane(self) -> bool:
        return self.nats < BOUND * self.chance

    def as_dict(self) -> dict[str, Any]:
        return {"nats_a_token": self.nats, "tokens": self.tokens, "chance": self.chance, "bound": BOUND * self.chance}

    def line(self, side: str) -> str:
        """One sentence."""
        told = f"{side} predicts a shipped text with {self.nats:.2f} nats a token (a uniform guess: {self.chance:.2f})"
        return told if self.sane else f"{told}: it has not learnt such text"


def predict_all(client: httpx.Client, plan: LaunchPlan, sides: Sequence[str]) -> dict[str, Prediction]:
    """By side, the base first; none where the plan does not know the vocabulary. Raises as `predict` does."""
    vocabulary = plan.value("model.vocab_size") if "model.vocab_size" in plan.resolved else 0
    if not vocabulary:
        return {}
    tokens = read_text(client, plan)
    return {side: predict(client, tokens, side if place else None, vocabulary) for place, side in enumerate(sides)}


def read_text(client: httpx.Client, plan: LaunchPlan) -> list[list[int]]:
    """Token ids of the passages, cut to what the server takes. Raises httpx.HTTPError."""
    body = {"model": plan.value("model.name"), "prompt": passages()[:PASSAGES]}
    answer = client.post("/tokenize", json=body)
    answer.raise_for_status()
    return [tokens[: room(plan)] for tokens in answer.json()["tokens"]]


def predict(client: httpx.Client, text: list[list[int]], adapter: str | None, vocabulary: int) -> Prediction:
    """Ask the server. Raises ProofFailed for what is no prediction at all, and httpx.HTTPError."""
    where = "proof" if adapter is None else f"lora.{adapter}"
    answer = ask(client, text, adapter)
    _demand_numbers(where, answer)
    given = answer.given_N[~_ends(text)]
    return Prediction(-float(given.mean()), len(given), math.log(vocabulary))


def _ends(text: list[list[int]]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Positions after which no token of the text follows."""
    ends = np.cumsum([len(tokens) for tokens in text]) - 1
    return np.isin(np.arange(sum(len(tokens) for tokens in text)), ends)


def _demand_numbers(where: str, answer: Answer) -> None:
    fix = "Weights are missing or broken: get the checkpoint again, then run kt-launch action=doctor"
    if not np.isfinite(answer.logprobs_NK).all():
        count = int((~np.isfinite(answer.logprobs_NK)).any(axis=1).sum())
        problem = f"{count} of {len(answer.logprobs_NK)} positions of a shipped text have logprobs that are no numbers"
        raise ProofFailed(where, problem, fix)
    spread = answer.logprobs_NK[:, 0] - answer.logprobs_NK[:, -1]
    if (spread < LEAST_SPREAD).all():
        raise ProofFailed(where, "every token is as probable as any other, at every position of a shipped text", fix)
