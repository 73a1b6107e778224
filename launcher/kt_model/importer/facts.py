"""The facts of an adapter that a plan needs: rank, scale, which modules it changes. Refuses adapters that cannot be
served.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from kt_model.adapters import AUTO_LAYOUT, AdapterFacts
from kt_model.checkpoint import Checkpoint
from kt_model.errors import LaunchError
from kt_model.importer.normal import Imported
from kt_model.importer.reading import import_adapter
from kt_model.importer.serving import lead_scale, require_served, target_modules, without

LABELS = {
    "routed_experts": "routed expert",
    "shared_experts": "shared expert",
    "attention": "attention",
    "dense_mlp": "dense MLP",
    "router": "router",
    "embeddings": "embedding",
}


def read_adapter(
    name: str,
    path: Path,
    base: Checkpoint | None,
    *,
    where: str,
    allow_missing: bool,
    layout: str = AUTO_LAYOUT,
    ignore: Sequence[str] = (),
) -> AdapterFacts:
    """The facts, or everything that is wrong with the adapter."""
    imported = import_adapter(path, base, where=where, layout=layout).require_sound()
    if base is not None and not allow_missing:
        require_complete(imported, base, where)
    require_served(imported, base, ignore, where)
    return facts_of(name, without(imported, ignore), base)


def facts_of(name: str, served: Imported, base: Checkpoint | None) -> AdapterFacts:
    """The facts of an adapter that is known to match. served: the adapter without ignored parts."""
    scale = lead_scale(served.pairs.values())
    pair_counts = Counter(LABELS[pair.target.kind] for pair in served.pairs.values())
    own = sum(1 for pair in served.pairs.values() if pair.scale != scale)
    rule = "alpha / sqrt(rank), use_rslora" if served.rank_stabilized else "alpha / rank"
    return AdapterFacts(
        name=name,
        path=served.path,
        rank=served.largest_rank,
        alpha=served.alpha,
        scale=scale,
        scale_rule=f"{rule}; {own} modules have their own" if own else rule,
        layout=str(served.order or ""),
        layout_why=served.order.why if served.order else "",
        pair_counts=dict(pair_counts),
        missing_pairs=sum(served.absent_experts(base.num_experts).values()) if base else 0,
        target_modules=tuple(sorted(target_modules(served))),
        warnings=served.warnings,
    )


def require_complete(imported: Imported, base: Checkpoint, where: str) -> None:
    """Raise if a layer has a projection of some experts but not of all: a file with holes, not a choice."""
    absent = imported.absent_experts(base.num_experts)
    if absent:
        problem = f"{sum(absent.values())} expert projections of the layers that it changes have no LoRA weights"
        raise LaunchError(where, problem, "Set lora.allow_missing=true to leave these as they are.")
