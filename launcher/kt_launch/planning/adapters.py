"""The adapters: what each one is, and the capacity that they need together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kt_launch.planning.draft import Draft
from kt_launch.planning.model import check_name
from kt_model.adapter_capacity import DEFAULT_PER_BATCH, DEFAULT_RANK, possible_modules, usual_modules, whole_groups
from kt_model.adapters import LAYOUT_KEY, AdapterFacts
from kt_model.chat_template import FLAG as CHAT_TEMPLATE
from kt_model.flags import typed_flags

if TYPE_CHECKING:
    from kt_model.checkpoint import Checkpoint


PLURALS = {"routed expert": "routed experts", "shared expert": "shared experts", "embedding": "embeddings"}


def resolve_adapters(draft: Draft) -> None:
    for adapter in draft.facts.adapters:
        key = f"lora.{adapter.name}"
        probed = f"probed: {adapter.path / 'adapter_config.json'}"
        check_name(draft, "lora.name", adapter.name)
        folder = draft.facts.adapter_folders.get(adapter.name)
        draft.set(f"{key}.path", str(adapter.path), folder.source if folder else "default")
        if folder and folder.commit:
            draft.set(f"{key}.revision", folder.commit, "probed: the Hub's cache")
        if folder and folder.training:
            draft.set(f"{key}.checkpoint", folder.training.chosen, folder.training.why)
        draft.set(f"{key}.rank", adapter.rank, probed)
        draft.set(f"{key}.alpha", adapter.alpha, probed)
        draft.set(f"{key}.scale", adapter.scale, f"derived: {adapter.scale_rule}")
        if adapter.layout:
            draft.set(f"{key}.layout", adapter.layout, _layout_source(draft, adapter))
        draft.set(f"{key}.reaches", _parts(adapter), "probed: the adapter's tensor names")
        draft.set(f"{key}.expert_pairs", adapter.expert_pairs, "probed: the adapter's tensor names")
        draft.warnings += [f"{key}: {warning}" for warning in adapter.warnings if _is_open(draft, warning)]
        if adapter.missing_pairs:
            draft.warnings.append(f"{key}: {adapter.missing_pairs} expert projections without LoRA weights add nothing")
    if draft.has_lora:
        _resolve_capacity(draft)


def _parts(adapter: AdapterFacts) -> str:
    """72 pairs on routed experts, 8 on attention."""
    counts = [(count, PLURALS.get(kind, kind)) for kind, count in adapter.pair_counts.items()]
    if not counts:
        return "nothing"
    (first, part), *others = counts
    noun = "pair" if first == 1 else "pairs"
    return ", ".join([f"{first} {noun} on {part}", *(f"{count} on {other}" for count, other in others)])


def _is_open(draft: Draft, warning: str) -> bool:
    """Whether what it asks for has not been typed."""
    return CHAT_TEMPLATE not in warning or CHAT_TEMPLATE not in typed_flags(draft.config.server.extra_args)


def _layout_source(draft: Draft, adapter: AdapterFacts) -> str:
    if adapter.layout_why != LAYOUT_KEY:
        return f"probed: {adapter.layout_why}"
    own = draft.config.lora.adapters.get(adapter.name)
    return draft.sources.of(f"lora.adapters.{adapter.name}.layout" if own and own.layout else LAYOUT_KEY)


def _resolve_capacity(draft: Draft) -> None:
    """The capacity reserved in memory: for the adapters of the launch, and for those loaded later."""
    adapters = draft.facts.adapters
    largest = max((adapter.rank for adapter in adapters), default=DEFAULT_RANK)
    source = "derived: largest rank of the adapters" if adapters else "default: capacity for adapters loaded later"
    rank = draft.keep_or("lora.max_rank", largest, source)
    if adapters and rank < largest:
        problem = f"{rank}, but an adapter has rank {largest}"
        draft.problems.add("lora.max_rank", problem, f"Set lora.max_rank={largest}.")
    count = len(adapters) + 1 if adapters else DEFAULT_PER_BATCH
    both = "derived: the adapters" if adapters else "default: one adapter loaded later,"
    source = f"{both} and the base model"
    draft.keep_or("lora.max_per_batch", count, source)
    _resolve_allowed(draft)
    if draft.facts.checkpoint is not None:
        _resolve_target_modules(draft, draft.facts.checkpoint)


def _resolve_allowed(draft: Draft) -> None:
    allowed = draft.facts.allowed
    if allowed is None:
        return
    draft.set("lora.allow", [str(path) for path in allowed.paths], allowed.source)
    if not allowed.paths and not draft.facts.adapters:
        problem = "no folder is given, so that the capacity for adapters cannot be used"
        draft.warnings.append(f"lora.allow: {problem}: set lora.allow=[/path/to/adapters]")


def _resolve_target_modules(draft: Draft, base: Checkpoint) -> None:
    key, typed, adapters = "lora.target_modules", draft.config.lora.target_modules, draft.facts.adapters
    reached = sorted({name for adapter in adapters for name in adapter.target_modules})
    if not typed:
        whose = "the modules that the adapters change" if adapters else f"all modules of {base.family.name}"
        draft.set(key, reached or usual_modules(base), f"derived: {whose}")
        return
    draft.set(key, whole_groups(typed), draft.sources.of(key))
    possible = possible_modules(base)
    if unknown := [name for name in typed if name not in possible]:
        problem = f"{', '.join(unknown)} cannot be served with adapters here"
        draft.problems.add(key, problem, f"Choose from {', '.join(possible)}.")
    elif missing := [name for name in reached if name not in draft.value(key)]:
        problem = f"the adapters also change {', '.join(missing)}"
        draft.problems.add(key, problem, f"Set {key}=[{','.join([*typed, *missing])}], or leave it out.")
