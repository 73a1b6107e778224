"""The adapters: what each one is, and the room that all of them need."""

from __future__ import annotations

from kt_launch.adapters import LAYOUT_KEY, AdapterFacts
from kt_launch.resolving.draft import Draft
from kt_launch.resolving.model import check_name


def resolve_adapters(draft: Draft) -> None:
    for adapter in draft.facts.adapters:
        key = f"lora.{adapter.name}"
        probed = f"probed: {adapter.path / 'adapter_config.json'}"
        check_name(draft, "lora.name", adapter.name)
        place = draft.facts.places.get(adapter.name)
        draft.set(f"{key}.path", str(adapter.path), place.source if place else "default")
        if place and place.training:
            draft.set(f"{key}.checkpoint", place.training.chosen, place.training.why)
        draft.set(f"{key}.rank", adapter.rank, probed)
        draft.set(f"{key}.alpha", adapter.alpha, probed)
        draft.set(f"{key}.scale", adapter.scale, f"derived: {adapter.scale_rule}")
        if adapter.layout:
            draft.set(f"{key}.layout", adapter.layout, _layout_source(draft, adapter))
        places = ", ".join(f"{count} {place}" for place, count in adapter.places.items())
        draft.set(f"{key}.reaches", places, "probed: the adapter's tensor names")
        draft.warnings += [f"{key}: {warning}" for warning in adapter.warnings]
        if adapter.missing_pairs:
            draft.warnings.append(f"{key}: {adapter.missing_pairs} missing expert projections add nothing")
    if draft.facts.adapters:
        _resolve_adapter_room(draft)


def _layout_source(draft: Draft, adapter: AdapterFacts) -> str:
    if adapter.layout_why != LAYOUT_KEY:
        return f"probed: {adapter.layout_why}"
    own = draft.config.lora.adapters.get(adapter.name)
    return draft.sources.of(f"lora.adapters.{adapter.name}.layout" if own and own.layout else LAYOUT_KEY)


def _resolve_adapter_room(draft: Draft) -> None:
    adapters, lora = draft.facts.adapters, draft.config.lora
    largest = max(adapter.rank for adapter in adapters)
    rank = draft.given_or("lora.max_rank", lora.max_rank, largest, "derived: largest rank of the adapters")
    if rank < largest:
        draft.problems.add(
            "lora.max_rank", f"{rank}, but an adapter has rank {largest}", f"Type lora.max_rank={largest}."
        )
    source = "derived: the adapters and the bare model"
    draft.given_or("lora.max_per_batch", lora.max_per_batch, len(adapters) + 1, source)
