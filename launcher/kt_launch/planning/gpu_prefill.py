"""Long prompts on a GPU: whether their experts may be streamed there, and how many tokens are processed at once. The
server measures from how many tokens on that is faster; whether the buffers fit is checked later (checks.py).
"""

from __future__ import annotations

from kt_launch.planning.draft import Draft
from kt_launch.planning.ranks import EXPERTS_KEY, ranks_of

KEY = "kt.gpu_prefill_tokens"
CHUNK = 8192
"""Prompt tokens per step if experts are streamed: all experts are streamed once a step, and requests that are decoding
wait for it. SGLang's own default on GPUs of this size."""
ROOMY_BYTES = 60 << 30
TRIED_METHODS = ("bf16", "int8", "int4")


def resolve_gpu_prefill(draft: Draft) -> None:
    kt = draft.config.kt
    if draft.value("server.device") == "cpu":
        draft.set(KEY, "off", "derived: there is no GPU to bring experts to")
    elif ranks_of(draft.config).first_has_experts:
        _leave_out(draft)
    elif kt.gpu_prefill_tokens is None and (untried := _untried(draft)):
        draft.set(KEY, "off", f"derived: {untried} has not run on a card this way; auto tries it")
    else:
        draft.given_or(KEY, kt.gpu_prefill_tokens, "auto", "derived: measured and proven at each start")
    gib, typed = kt.gpu_prefill_gib, draft.sources.of("kt.gpu_prefill_gib")
    usual = "default: up to about 1.5, at least two experts and one unpacked"
    draft.set("kt.gpu_prefill_gib", gib, typed if gib else usual)
    chunk = CHUNK if draft.value(KEY) != "off" and _is_roomy(draft) else None
    source = "derived: all experts come to the GPU once a step" if chunk else "default: SGLang chooses"
    draft.given_or("server.chunked_prefill_size", draft.config.server.chunked_prefill_size, chunk, source)


def _leave_out(draft: Draft) -> None:
    """One card would have all to bring, and the others wait for it."""
    why = f"with {EXPERTS_KEY}=rank0 only the first GPU has experts to bring"
    draft.set(KEY, "off", f"derived: {why}")
    if (given := draft.config.kt.gpu_prefill_tokens) not in (None, "off"):
        draft.problems.add(KEY, f"{given}, but {why}", f"Leave it out, or set {EXPERTS_KEY}=split.")


def _untried(draft: Draft) -> str:
    """The part of the plan that has never been run on a GPU with streamed experts; '' if all of it has."""
    kt, server = draft.config.kt, draft.config.server
    if kt.method not in TRIED_METHODS:
        return f"kt.method={kt.method}"
    return "server.tp" if server.tp > 1 else "server.dp" if server.dp > 1 else ""


def _is_roomy(draft: Draft) -> bool:
    gpus = draft.facts.host.gpus
    return bool(gpus) and gpus[0].memory_bytes >= ROOMY_BYTES
