"""How well a server predicts a shipped text: the check that works for a model of any size. Decides what counts as a
failure.

A trained model finds a token of the text more probable in its own position than another token of the same text: on
average by 5 to 9 nats if it was trained on English, by 1.2 for the demo, which knows little but its training texts. The
nats per token alone would not tell, since an overconfident model, as the demo is, may predict unfamiliar text worse
than a uniform guess. A model with random weights, or with broken attention or a broken head, has a gain of 0 within the
standard deviation of the mean. So the gain must exceed SIGMAS standard deviations.

A checkpoint of random weights fails, as it should. If the whole model was compared with transformers, that result
counts, and this one is only reported.
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
"""Characters of the shipped text: 250 tokens of a usual vocabulary."""
OTHERS = 128
"""How many other tokens of the text each token is compared with."""
SIGMAS = 3.0
LEAST_SPREAD = 1e-3
"""Nats between the first and the last of the most probable tokens, below which all count as equal."""


@dataclass(frozen=True)
class Prediction:
    """Over `tokens` tokens: nats per token; how many nats likelier they are than other tokens of the text, and the
    standard deviation of that mean."""

    tokens: int
    nats: float
    gain: float
    deviation: float

    @property
    def least(self) -> float:
        """The largest gain that chance would give."""
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
    """Token ids of the passages, cut to the length that the server accepts. Raises httpx.HTTPError."""
    body = {"model": plan.value("model.name"), "prompt": passages()[:PASSAGES]}
    answer = client.post("/tokenize", json=body)
    answer.raise_for_status()
    return [tokens[: longest_prompt(plan)] for tokens in answer.json()["tokens"]]


def predict(client: httpx.Client, text: list[list[int]], adapter: str | None) -> Prediction:
    """Queries the server. Raises ProofFailed if the answer is no prediction at all, and httpx.HTTPError."""
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
    """Positions that are followed by no token of the text."""
    ends = np.cumsum([len(tokens) for tokens in text]) - 1
    return np.isin(np.arange(sum(len(tokens) for tokens in text)), ends)


def _require_numbers(where: str, answer: Answer) -> None:
    fix = "Weights are missing or broken: download the checkpoint again, then run kt-launch doctor"
    if not np.isfinite(answer.logprobs_NK).all():
        count = int((~np.isfinite(answer.logprobs_NK)).any(axis=1).sum())
        problem = f"{count} of {len(answer.logprobs_NK)} positions of a shipped text have logprobs that are not numbers"
        raise ProofFailed(where, problem, fix)
    spread = answer.logprobs_NK[:, 0] - answer.logprobs_NK[:, -1]
    if (spread < LEAST_SPREAD).all():
        raise ProofFailed(where, "every token is as probable as any other, at every position of a shipped text", fix)
