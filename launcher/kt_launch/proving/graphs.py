"""Proof that a replayed decode step gives the same result as an eager step, on this device and in this start.

The server generates a few tokens, in decode steps and therefore replayed, with the base and every adapter side by side
in one padded batch. It then reads the same tokens as prompts, which no graph captures, and the logprobs are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import httpx

from kt_launch.proving.generate import generate
from kt_launch.proving.proof import computing_of, scheduler_reports
from kt_model.acceptance import PROMPT
from kt_model.contract import BASE, Report
from kt_model.errors import ProofFailed
from kt_model.plan import LaunchPlan

TOKENS = 9
"""Tokens generated per request; the first comes from the prompt's own step."""
LIMIT = 0.25
"""Largest |Δ logprob| of a token. Both paths round to bfloat16 (8 bits) in every layer, in a different order and, with
MLA, in a different form of attention; a wrong row, slot or adapter changes logprobs by more than 1 on any trained
model."""


def prove_replay(plan: LaunchPlan, client: httpx.Client) -> dict[str, float]:
    """Per side (base or adapter) the largest |Δ logprob|; empty if SGLang replays nothing.

    Raises ProofFailed naming the side.
    """
    before = scheduler_reports(client)
    differences = replay_differences(client, tuple(plan.adapters))
    after = scheduler_reports(client)
    if _counted(after, "replayed") == _counted(before, "replayed"):
        return {}
    for side, found in differences.items():
        if not found <= LIMIT:
            off = f"by {found:.2g} in the logprob of a token, expected at most {LIMIT:g}"
            raise _failed(f"a replayed step of {side} differs from an eager one {off}")
    reaching = [name for name in plan.adapters if plan.reaches_experts(name)]
    rows = _counted(after, "replayed_adapter_tokens") - _counted(before, "replayed_adapter_tokens")
    if rows < len(reaching) * (TOKENS - 1):
        wanted = len(reaching) * (TOKENS - 1)
        raise _failed(f"{rows} adapter rows went through kt_kernels in replayed steps, expected {wanted}")
    return differences


def replay_differences(client: httpx.Client, adapters: Sequence[str]) -> dict[str, float]:
    """Largest |Δ logprob| per side between generated tokens and the same tokens read as a prompt."""
    sides = _padded_batch(adapters)
    written = _ask(client, {"text": [PROMPT] * len(sides)}, sides, TOKENS, 0)
    prompts = [_column(answer, "input_token_logprobs", 1) for answer in written]
    tokens = [_column(answer, "output_token_logprobs", 1) for answer in written]
    texts = [[*prompt, *added] for prompt, added in zip(prompts, tokens, strict=True)]
    read = _ask(client, {"input_ids": texts}, sides, 1, min(map(len, prompts)))
    found: dict[str, float] = {}
    for side, one, other in zip(sides, written, read, strict=True):
        replayed = _column(one, "output_token_logprobs", 0)[1:]
        eager = _column(other, "input_token_logprobs", 0)[1 - TOKENS :]
        worst = max(abs(a - b) for a, b in zip(replayed, eager, strict=True))
        found[side or BASE] = max(found.get(side or BASE, 0.0), worst)
    return found


def _padded_batch(adapters: Sequence[str]) -> list[str | None]:
    """The base, every adapter, and the base again until the batch size is between two captured sizes."""
    sides: list[str | None] = [None, *adapters]
    while len(sides) & (len(sides) - 1) == 0:
        sides.append(None)
    return sides


def _ask(
    client: httpx.Client, prompts: dict[str, Any], sides: Sequence[str | None], tokens: int, start: int
) -> list[dict[str, Any]]:
    options = {"sampling_params": {"ignore_eos": True}, "lora_path": list(sides) if any(sides) else None}
    found: list[dict[str, Any]] = generate(
        client, tokens, **prompts, **options, return_logprob=True, logprob_start_len=start
    )
    return found


def _column(answer: dict[str, Any], key: str, at: int) -> list[Any]:
    """0: logprobs, 1: token ids."""
    return [entry[at] for entry in answer["meta_info"][key]]


def _counted(reports: list[Report], key: Literal["replayed", "replayed_adapter_tokens"]) -> int:
    return min((layer[key] for report in computing_of(reports) for layer in report["layers"]), default=0)


def _failed(problem: str) -> ProofFailed:
    return ProofFailed("server.cuda_graph", problem, "Set server.cuda_graph=off, and report this with the run folder.")
