"""Requests of the proof to the running server, and the answers as arrays: logprobs at every position of prompts given
as token ids, so that nothing depends on a tokenizer or a chat template.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

from kt_launch.proving.generate import generate
from kt_model.plan import LaunchPlan

TOP = 20
SEED = 20
LENGTHS = (24, 40, 56, 72, 88, 104, 136, 200)
"""Lengths of the random prompts in tokens: short ones, and positions above 100, where a wrong rotation shows best."""
UNKNOWN_ROOM = 4096
"""Assumed context in tokens if SGLang chooses it."""
RESERVED_TOKENS = 8
"""Tokens of the context that SGLang reserves for the answer and for itself."""

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int32]
Row = Sequence[Sequence[Any]]
"""For one position: logprob, token id and text of some tokens."""


@dataclass(frozen=True)
class Answer:
    """N positions of all prompts: the server's TOP most probable next tokens, and their logprobs. The first position of
    a prompt predicts its second token, the last one the token after the prompt."""

    ids_NK: Integers
    logprobs_NK: Floats
    given_N: Floats
    """Logprob of the prompt's own next token; NaN after the end of a prompt."""
    asked_NC: Floats
    """Logprobs of the C tokens requested by token_ids_logprob, in their order."""


def longest_prompt(plan: LaunchPlan) -> int:
    """The most tokens that a prompt of the proof may have."""
    limits = [plan.value(f"server.{name}") or UNKNOWN_ROOM for name in ("context_length", "max_total_tokens")]
    return min(*limits, UNKNOWN_ROOM) - RESERVED_TOKENS


def random_prompts(plan: LaunchPlan) -> list[list[int]]:
    """Uniformly random token ids: repeated tokens and short prompts would hide faults in positions."""
    rng, most = random.Random(SEED), plan.value("model.vocab_size")
    longest = min(longest_prompt(plan), LENGTHS[-1])
    lengths = [max(length * longest // LENGTHS[-1], 2) for length in LENGTHS]
    return [[rng.randrange(most) for _ in range(length)] for length in lengths]


def ask(client: httpx.Client, prompts: Sequence[Sequence[int]], adapter: str | None, **options: Any) -> Answer:
    """One request for all prompts, without cached prefixes. Raises httpx.HTTPError, ProofFailed on other answers."""
    found = _generate(client, {"input_ids": prompts, "lora_path": adapter, "logprob_start_len": 0, **options})
    rows, given, asked = [], [], []
    for one in found:  # the first token of a prompt is predicted from nothing and has no row
        rows += [*one["input_top_logprobs"][1:], one["output_top_logprobs"][0]]
        given += [*(entry[0] for entry in one["input_token_logprobs"][1:]), None]
        if "token_ids_logprob" in options:
            asked += [*one["input_token_ids_logprobs"][1:], one["output_token_ids_logprobs"][0]]
    return _answer(rows, given, asked)


def ask_together(
    client: httpx.Client, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None], **options: Any
) -> list[Answer]:
    """First tokens after the prompts for every adapter, in one batch of requests as clients send them."""
    pairs = [(prompt, adapter) for prompt in prompts for adapter in adapters]
    body = {"input_ids": [prompt for prompt, _ in pairs], "lora_path": [adapter for _, adapter in pairs], **options}
    rows = [one["output_top_logprobs"][0] for one in _generate(client, body)]
    return [_answer(rows[place :: len(adapters)], [None] * len(prompts), []) for place in range(len(adapters))]


def _generate(client: httpx.Client, options: dict[str, Any]) -> list[dict[str, Any]]:
    answers = generate(client, return_logprob=True, top_logprobs_num=TOP, **options)
    return [found["meta_info"] for found in answers]


def _answer(rows: Sequence[Row], given: Sequence[float | None], asked: Sequence[Row]) -> Answer:
    ids = np.array([[entry[1] for entry in row] for row in rows], np.int32)
    with np.errstate(over="ignore"):
        logprobs = np.array([[entry[0] for entry in row] for row in rows], np.float32)
        others = np.array([[entry[0] for entry in row] for row in asked], np.float32).reshape(len(rows), -1)
        return Answer(ids, logprobs, np.array(given, np.float32), others)
