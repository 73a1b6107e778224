"""Long prompts on a GPU: whether their experts may come there, and how many tokens go through at once. From how many
tokens on it is faster is measured by the server; whether the buffers fit is known later (checks.py).
"""

from __future__ import annotations

from kt_launch.planning.draft import Draft

KEY = "kt.gpu_prefill_tokens"
CHUNK = 8192
"""Tokens of prompts in one step where experts come for them: all experts come once a step, and requests that are being
answered wait for it. It is what SGLang takes on GPUs of this size itself."""
ROOMY_BYTES = 60 << 30


def resolve_gpu_prefill(draft: Draft) -> None:
    kt = draft.config.kt
    if draft.value("server.device") == "cpu":
        draft.set(KEY, "off", "derived: there is no GPU to bring experts to")
    elif kt.gpu_prefill_tokens is None and (untried := _untried(draft)):
        draft.set(KEY, "off", f"derived: {untried} has not run on a card this way; auto tries it")
    else:
        draft.given_or(KEY, kt.gpu_prefill_tokens, "auto", "derived: measured and proven at each start")
    gib, typed = kt.gpu_prefill_gib, draft.sources.of("kt.gpu_prefill_gib")
    draft.set("kt.gpu_prefill_gib", gib, typed if gib else "default: about 1, at least two experts and one unpacked")
    chunk = CHUNK if draft.value(KEY) != "off" and _is_roomy(draft) else None
    source = "derived: all experts come to the GPU once a step" if chunk else "default: SGLang chooses"
    draft.given_or("server.chunked_prefill_size", draft.config.server.chunked_prefill_size, chunk, source)


def _untried(draft: Draft) -> str:
    """What of the plan nobody has seen on a card with experts that come there; '' where all of it has been."""
    kt, server = draft.config.kt, draft.config.server
    if kt.method != "bf16":
        return f"kt.method={kt.method}"
    return "server.tp" if server.tp > 1 else "server.dp" if server.dp > 1 else ""


def _is_roomy(draft: Draft) -> bool:
    gpus = draft.facts.host.gpus
    return bool(gpus) and gpus[0].memory_bytes >= ROOMY_BYTES
