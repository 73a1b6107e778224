"""Proof that experts streamed to the GPU for long prompts compute what kt_kernels computes.

The schedulers compare both paths in every layer, for the base and for each adapter, during the proof's earlier requests
(kt_sglang.prompts.prefill). Here their findings are read, and a long prompt checks that the GPU path is really used.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import httpx

from kt_launch.proving.generate import generate, post
from kt_launch.proving.proof import scheduler_reports
from kt_model.acceptance import PROMPT
from kt_model.contract import BASE, GpuPrefillReport, Report
from kt_model.errors import ProofFailed
from kt_model.plan import LaunchPlan

KEY = "kt.gpu_prefill_tokens"
MOST_ASKED = 8192
"""Tokens of the long prompt; a threshold above this is not tried."""


@dataclass(frozen=True)
class PrefillProof:
    """The findings. off: why the GPU path is not used; empty if it is."""

    off: str = ""
    tokens: int = 0
    """Batch size in tokens from which on the GPU path is used."""
    why: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    """For base and adapters: largest relative L2 difference of a layer from kt_kernels."""
    measured: list[tuple[int, float, float]] = field(default_factory=list)
    between_ms: float = 0.0
    link_gb_s: float = 0.0
    ran: dict[str, int] = field(default_factory=dict)
    """Tokens of base and adapters computed on the GPU path; empty if the threshold is too high to try."""

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
    """None if it is switched off. Raises ProofFailed if a number of tokens was typed and it cannot be used."""
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
        between_ms=one["between_ms"],
        link_gb_s=one["link_gb_s"],
        ran=_run_long(plan, client, one["tokens"] or 0),
    )


def _run_long(plan: LaunchPlan, client: httpx.Client, tokens: int) -> dict[str, int]:
    """Sends a prompt of so many tokens to the base and to the first adapter on experts; tokens computed on the GPU
    path."""
    context = plan.value("server.context_length") or MOST_ASKED
    if tokens + 2 > min(MOST_ASKED, context):
        return {}
    reaching = [name for name in plan.adapters if plan.reaches_experts(name)]
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
    """Generate one token after a prompt of tokens + 1; returns whether the server accepts so long a prompt."""
    read = generate(client, text=PROMPT, return_logprob=True, logprob_start_len=0)
    words = [entry[1] for entry in read["meta_info"]["input_token_logprobs"]]
    ids = (words * (tokens // len(words) + 1))[: tokens + 1]
    return post(client, input_ids=ids, lora_path=adapter).is_success


def _grown(before: list[Report], after: list[Report], *, adapted: bool) -> int:
    """The increase, in the replica that handled the request."""

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
    """The largest of the base, and the largest of any adapter."""
    found: dict[str, float] = {}
    for report in reports:
        for name, error in _found(report)["errors"].items():
            side = BASE if name == BASE else "adapters"
            found[side] = max(found.get(side, 0.0), error)
    return found
