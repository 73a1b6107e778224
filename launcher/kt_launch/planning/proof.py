"""Whether the whole model is compared with transformers before the server is called ready: depends on its size, on what
is installed, and on the memory that the server leaves.
"""

from __future__ import annotations

from kt_launch.planning.draft import Draft
from kt_model.plan import HOST_MEMORY
from kt_model.tensors.header import BITS
from kt_model.units import GIB, gib

KEY = "proof.whole_model"
UNTOLD = "config.json has no vocab_size"
FLOAT32_BYTES = 4
LOADING = 1.25
"""Peak memory of transformers while loading, relative to the loaded model: experts are merged layer by layer."""
RUN_BYTES = 2 * GIB
"""Memory of transformers and torch themselves, and of a prompt's logits for any vocabulary."""


def resolve_proof(draft: Draft) -> None:
    """Called once the server's own memory is known."""
    if draft.facts.checkpoint is None:
        return
    reason = _reason_against(draft)
    source = f"derived: {reason}" if reason else draft.sources.of(KEY)
    draft.set(KEY, "off" if reason else draft.config.proof.whole_model, source)


def _reason_against(draft: Draft) -> str:
    """Why it is not compared; '' if it can be, or is switched off."""
    proof, base = draft.config.proof, draft.facts.checkpoint
    assert base is not None
    if proof.whole_model == "off":
        return ""
    size = sum(tensor.end - tensor.start for tensor in base.tensors.values())
    if size > proof.whole_model_gib * GIB:
        return f"{gib(size)} GiB on disk, more than proof.whole_model_gib={proof.whole_model_gib:g}"
    if not base.vocab_size:
        return UNTOLD
    if not draft.facts.transformers:
        return "transformers is not installed"
    values = sum((tensor.end - tensor.start) * 8 // BITS[tensor.dtype] for tensor in base.tensors.values())
    needed, left = int(values * FLOAT32_BYTES * LOADING) + RUN_BYTES, _left_bytes(draft)
    if left is not None and needed > left:
        return f"it takes {gib(needed)} GiB of memory, and the server leaves {gib(left)} GiB"
    return ""


def _left_bytes(draft: Draft) -> int | None:
    """Memory left by the server; None if the machine does not say what is free."""
    free = draft.facts.host.free_bytes
    if not free or "fit" not in draft.resolved:
        return None
    taken: dict[str, int] = draft.value("fit").get(HOST_MEMORY, {})
    return free - sum(taken.values())
