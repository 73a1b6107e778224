"""Proof that experts which come to the GPU for long prompts compute there what kt_kernels computes.

The schedulers compare both ways in every layer, for the base and for each adapter, in the proof's own requests before
(kt_sglang.prefill); here their findings are read, and a long prompt shows that it is really computed there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import httpx

from kt_launch.proving.proof import generate, scheduler_reports
from kt_model.acceptance import PROMPT
from kt_model.contract import BASE, GpuPrefillReport, Report
from kt_model.errors import ProofFailed
from kt_model.plan import LaunchPlan

KEY = "kt.gpu_prefill_tokens"
MOST_ASKED = 8192
"""Tokens of the long prompt; a crossing beyond is not walked to."""


@dataclass(frozen=True)
class PrefillProof:
    """What was found. off: why it is not used; empty where it is."""

    off: str = ""
    tokens: int = 0
    """Of a batch, from which on."""
    why: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    """Of base and adapters: largest relative L2 difference of a layer from kt_kernels."""
    measured: list[tuple[int, float, float]] = field(default_factory=list)
    link_gb_s: float = 0.0
    ran: dict[str, int] = field(default_factory=dict)
    """Tokens of base and adapters that were computed there; none where the crossing lies too far."""

    def lines(self) -> list[str]:
        """Sentences for the terminal."""
        if self.off:
            return [f"warning: {KEY}: off: {self.off}"]
        worst = ", ".join(f"{side} {error:.1e}" for side, error in self.errors.items())
        ran = ", ".join(f"{side} {count} tokens" for side, count in self.ran.items())
        return [
            f"from {self.tokens} tokens on, experts come to the GPU ({self.why}); they give there what kt_kernels "
            f"gives: relative L2 difference {worst}" + (f"; it ran: {ran}" if ran else "")
        ]


def prove_prefill(plan: LaunchPlan, client: httpx.Client) -> PrefillProof | None:
    """None where nobody wants it. Raises ProofFailed where a number of tokens was typed and it cannot be used."""
    wanted = plan.resolved.get(KEY)
    if wanted is None or wanted.value == "off":
        return None
    before = [_found(report) for report in scheduler_reports(client)]
    failed = next((one["why"] for one in before if one["state"] != "on"), "")
    if failed and wanted.value != "auto":
        raise ProofFailed(KEY, f"{wanted.value}, but it cannot be used: {failed}", f"Set {KEY}=off.")
    if failed:
        return PrefillProof(off=failed)
    one = max(before, key=lambda each: each["tokens"] or 0)
    return PrefillProof(
        tokens=one["tokens"] or 0,
        why=one["why"],
        errors=_errors(scheduler_reports(client)),
        measured=one["measured"],
        link_gb_s=one["link_gb_s"],
        ran=_run_long(plan, client, one["tokens"] or 0),
    )


def _run_long(plan: LaunchPlan, client: httpx.Client, tokens: int) -> dict[str, int]:
    """A prompt of so many tokens for the base and the first adapter on experts: how many were computed there."""
    context = plan.value("server.context_length") or MOST_ASKED
    if tokens + 2 > min(MOST_ASKED, context):
        return {}
    reaching = [name for name in plan.adapters if "routed expert" in plan.value(f"lora.{name}.reaches")]
    ran = {}
    for side in (None, *reaching[:1]):
        before = scheduler_reports(client)
        if not _read_long(client, side, tokens):
            return {}
        ran[side or BASE] = _grown(before, scheduler_reports(client), adapted=side is not None)
        if ran[side or BASE] < tokens:
            problem = f"{ran[side or BASE]} of {tokens} tokens of {side or BASE} were computed on the GPU"
            raise ProofFailed(KEY, problem, f"Set {KEY}=off, and report this with the run folder.")
    return ran


def _read_long(client: httpx.Client, adapter: str | None, tokens: int) -> bool:
    """One token after a prompt of so many and one more; whether the server takes so many."""
    read = generate(client, PROMPT, return_logprob=True, logprob_start_len=0)
    words = [entry[1] for entry in read["meta_info"]["input_token_logprobs"]]
    body: dict[str, Any] = {"input_ids": (words * (tokens // len(words) + 1))[: tokens + 1]}
    body |= {"sampling_params": {"max_new_tokens": 1, "temperature": 0.0}}
    client.post("/flush_cache")
    return client.post("/generate", json=body | ({"lora_path": adapter} if adapter else {})).is_success


def _grown(before: list[Report], after: list[Report], *, adapted: bool) -> int:
    """Of the replica that was asked."""

    def counts(reports: list[Report]) -> list[int]:
        found = [_found(report) for report in reports]
        return [each["adapter_tokens_ran"] if adapted else each["tokens_ran"] for each in found]

    return max(late - early for early, late in zip(counts(before), counts(after), strict=True))


def _found(report: Report) -> GpuPrefillReport:
    found = report.get("gpu_prefill")
    if found is None:
        raise ProofFailed(KEY, "a scheduler process does not know of it", f"Set {KEY}=off, and report this.")
    return found


def _errors(reports: list[Report]) -> dict[str, float]:
    """Largest of the base and of any adapter."""
    found: dict[str, float] = {}
    for report in reports:
        for name, error in _found(report)["errors"].items():
            side = BASE if name == BASE else "adapters"
            found[side] = max(found.get(side, 0.0), error)
    return found
