"""How well a server predicts a shipped text: the check that a model of any size can take. Decides what of it is a
failure.

A model that reads finds a token of the text more probable where it stands than another token of the same text there: on
average by 5 to 9 nats if it was trained on English, by 1.2 for the demo, which knows little else than its lessons. Nats
a token alone would not tell, since a model that is sure of itself, as the demo is, may predict a strange text worse
than a uniform guess does. A model of random weights, or one whose attention or head is broken, has a gain of 0, give or
take the deviation of the mean. So the gain has to exceed SIGMAS of these.

A checkpoint of random weights fails by right; where the whole model was held against transformers, that is what counts,
and the number is only told.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from kt_launch.proving.logprobs import SEED, Answer, ask, longest_prompt
from kt_launch.proving.passages import passages
from kt_model.errors import ProofFailed
from kt_model.plan import LaunchPlan

KEY = "proof.text"
PASSAGES = 3
"""Of the shipped text: 250 tokens of a usual vocabulary."""
OTHERS = 128
"""Tokens of the text that each token of it is held against."""
SIGMAS = 3.0
LEAST_SPREAD = 1e-3
"""Nats between the first and the last of the most probable tokens, below which all are the same."""


@dataclass(frozen=True)
class Prediction:
    """Over so many tokens: nats a token; by how many nats they are likelier than others of the text, and the standard
    deviation of that mean."""

    tokens: int
    nats: float
    gain: float
    deviation: float

    @property
    def least(self) -> float:
        """Gain that chance does not reach."""
        return SIGMAS * self.deviation

    @property
    def sane(self) -> bool:
        return self.gain > self.least

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        summary = {"tokens": self.tokens, "nats_a_token": self.nats, "gain": self.gain, "deviation": self.deviation}
        return {**summary, "least_gain": self.least}

    def line(self, side: str) -> str:
        """One sentence."""
        found = f"tokens of a shipped text are {self.gain:.2f} nats likelier at their own positions than at others"
        chance = f"chance: 0 ± {self.deviation:.2f}"
        return f"{side} {'reads' if self.sane else 'does not read'}: {found} ({chance}; {self.nats:.2f} nats a token)"


def predict_all(client: httpx.Client, plan: LaunchPlan, sides: Sequence[str]) -> dict[str, Prediction]:
    """By side, the base first. Raises as `predict` does."""
    tokens = read_text(client, plan)
    return {side: predict(client, tokens, side if place else None) for place, side in enumerate(sides)}


def read_text(client: httpx.Client, plan: LaunchPlan) -> list[list[int]]:
    """Token ids of the passages, cut to what the server takes. Raises httpx.HTTPError."""
    body = {"model": plan.value("model.name"), "prompt": passages()[:PASSAGES]}
    answer = client.post("/tokenize", json=body)
    answer.raise_for_status()
    return [tokens[: longest_prompt(plan)] for tokens in answer.json()["tokens"]]


def predict(client: httpx.Client, text: list[list[int]], adapter: str | None) -> Prediction:
    """Ask the server. Raises ProofFailed for what is no prediction at all, and httpx.HTTPError."""
    tokens = [token for passage in text for token in passage]
    others = Counter(random.Random(SEED).sample(tokens, min(OTHERS, len(tokens))))
    answer = ask(client, text, adapter, token_ids_logprob=sorted(others))
    _require_numbers("proof" if adapter is None else f"lora.{adapter}", answer)
    inside = ~_ends(text)
    given, elsewhere = answer.given_N[inside].astype(np.float64), answer.asked_NC[inside].astype(np.float64)
    shares = np.array([others[token] for token in sorted(others)]) / others.total()
    gain = given - elsewhere @ shares
    return Prediction(len(given), -float(given.mean()), float(gain.mean()), float(gain.std() / len(gain) ** 0.5))


def _ends(text: list[list[int]]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Positions after which no token of the text follows."""
    ends = np.cumsum([len(tokens) for tokens in text]) - 1
    return np.isin(np.arange(sum(len(tokens) for tokens in text)), ends)


def _require_numbers(where: str, answer: Answer) -> None:
    fix = "Weights are missing or broken: download the checkpoint again, then run kt-launch action=doctor"
    if not np.isfinite(answer.logprobs_NK).all():
        count = int((~np.isfinite(answer.logprobs_NK)).any(axis=1).sum())
        problem = f"{count} of {len(answer.logprobs_NK)} positions of a shipped text have logprobs that are not numbers"
        raise ProofFailed(where, problem, fix)
    spread = answer.logprobs_NK[:, 0] - answer.logprobs_NK[:, -1]
    if (spread < LEAST_SPREAD).all():
        raise ProofFailed(where, "every token is as probable as any other, at every position of a shipped text", fix)
