"""The routed experts: their number format, the folder their weights come from, the packed cache."""

from __future__ import annotations

from kt_launch.planning.draft import Draft
from kt_model.methods import method_of
from kt_model.user_paths import absolute


def resolve_experts(draft: Draft) -> None:
    if not method_of(draft.keep("kt.method")).quantized:
        _resolve_own_weights(draft, draft.config.kt.weight_path)
    elif (experts := draft.facts.experts) is not None:
        draft.set("kt.weight_path", str(experts.path), experts.source)
        if experts.foreign:
            draft.warnings.append(f"kt.weight_path: {experts.foreign}; using {experts.path}")
    _resolve_profile(draft)
    _resolve_gpu_experts(draft)
    draft.keep("kt.handover")
    _resolve_packed_cache(draft)


def _resolve_own_weights(draft: Draft, given: str | None) -> None:
    model = draft.facts.model
    if model is None:
        return
    if given is not None and absolute(given) != model.path:
        problem = f"{draft.config.kt.method} reads the experts from model.path, not from {given}"
        draft.problems.add("kt.weight_path", problem, "Leave kt.weight_path out.")
    source = f"derived: {draft.config.kt.method} reads the experts from model.path"
    draft.set("kt.weight_path", str(model.path), source)


def _resolve_packed_cache(draft: Draft) -> None:
    draft.keep("kt.packed_cache")
    packed = draft.facts.packed
    if packed is None:
        return
    draft.set("kt.packed_entry", packed.folder and str(packed.folder), f"probed: {packed.state}")
    if packed.problem:
        draft.warnings.append(f"kt.packed_cache: {packed.problem}")


def _resolve_profile(draft: Draft) -> None:
    kt, profile, base = draft.config.kt, draft.facts.expert_profile, draft.facts.checkpoint
    for name, path in (("expert_profile", kt.expert_profile), ("record_experts", kt.record_experts)):
        source = draft.sources.of(f"kt.{name}") if path else "default: none"
        draft.set(f"kt.{name}", path and str(absolute(path)), source)
    missing = sorted({*base.moe_layers} - {*profile.layers}) if profile and base else []
    if missing:
        problem = f"{kt.expert_profile} has no counts of layer {missing[0]}"
        draft.problems.add("kt.expert_profile", problem, "Record one of this model: kt.record_experts=<file>.")


def _resolve_gpu_experts(draft: Draft) -> None:
    """The typed number, or 0 if none can be resident. How many fit on a GPU is resolved later (checks.py)."""
    given, base = draft.config.kt.num_gpu_experts, draft.facts.checkpoint
    if given is None or given == "auto":
        draft.set("kt.num_gpu_experts", 0, f"derived: {_why_none(draft) or _otherwise(given)}")
        return
    draft.keep("kt.num_gpu_experts")
    if given < 0 or (base and given >= base.num_experts):
        most = f"0 to {base.num_experts - 1} are expected" if base else "0 is expected"
        draft.problems.add("kt.num_gpu_experts", f"{given}, but {most}", "Set kt.num_gpu_experts=0.")
    elif given and draft.config.kt.record_experts:
        problem = f"{given}, but kt.record_experts counts experts that run on the CPU"
        draft.problems.add("kt.num_gpu_experts", problem, "Set kt.num_gpu_experts=0.")
    elif given and draft.value("server.device") == "cpu":
        slow = "without a GPU the resident experts are computed by plain torch, which is slow"
        draft.warnings.append(f"kt.num_gpu_experts: {slow}. Set kt.num_gpu_experts=0.")


def _otherwise(given: str | None) -> str:
    """Why none is resident although some could be."""
    return "none fit on the GPU" if given else "all routed experts on the CPU; auto takes as many as fit on the GPU"


def _why_none(draft: Draft) -> str | None:
    """Why no expert can be resident; None if some may be."""
    if draft.config.kt.record_experts:
        return "kt.record_experts counts experts that run on the CPU"
    if draft.value("server.device") != "cpu":
        return None
    if draft.expert_lora:
        return "expert LoRA needs all routed experts on the CPU"
    return "all routed experts on the CPU"


def chooses_residents(draft: Draft) -> bool:
    """Whether as many experts as fit on the GPU are to be resident."""
    return draft.config.kt.num_gpu_experts == "auto" and _why_none(draft) is None


def resident_step(num_experts: int) -> int:
    """A number of resident experts that nobody typed is a multiple of this: the packed cache has an entry for each
    number."""
    return max(1, num_experts // 8)
