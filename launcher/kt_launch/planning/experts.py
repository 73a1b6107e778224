"""The routed experts: their number format, the folder their weights come from, the packed cache."""

from __future__ import annotations

from kt_launch.planning.draft import Draft
from kt_launch.planning.locate import absolute
from kt_model.methods import METHODS


def resolve_experts(draft: Draft) -> None:
    kt = draft.config.kt
    method = METHODS[kt.method]
    draft.set("kt.method", kt.method, draft.sources.of("kt.method"))
    if method.weights == "model.path":
        _resolve_own_weights(draft, kt.weight_path)
    elif (experts := draft.facts.experts) is not None:
        draft.set("kt.weight_path", str(experts.path), experts.source)
        if experts.foreign:
            draft.warnings.append(f"kt.weight_path: {experts.foreign}; used is {experts.path}")
    _resolve_gpu_experts(draft, kt.num_gpu_experts)
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
    draft.set("kt.packed_cache", draft.config.kt.packed_cache, draft.sources.of("kt.packed_cache"))
    packed = draft.facts.packed
    if packed is None:
        return
    draft.set("kt.packed_entry", packed.folder and str(packed.folder), f"probed: {packed.state}")
    if packed.problem:
        draft.warnings.append(f"kt.packed_cache: {packed.problem}")


def _resolve_gpu_experts(draft: Draft, given: int | None) -> None:
    reason = "expert LoRA needs all routed experts on the CPU" if draft.expert_lora else "all routed experts on the CPU"
    count = draft.given_or("kt.num_gpu_experts", given, 0, f"derived: {reason}")
    if count < 0:
        draft.problems.add("kt.num_gpu_experts", f"{count}, but 0 is expected", "Type kt.num_gpu_experts=0.")
    elif count > 0:
        problem = f"{count} routed experts on the device are not built yet"
        draft.problems.add("kt.num_gpu_experts", problem, "Type kt.num_gpu_experts=0.")
