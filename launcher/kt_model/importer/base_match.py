"""Whether an adapter's pairs match this base: layers, experts, modules, dimensions."""

from __future__ import annotations

from collections.abc import Iterable

from kt_model.checkpoint import Checkpoint
from kt_model.importer.mistakes import Mistakes
from kt_model.importer.names import UNKNOWN_MODULE
from kt_model.importer.normal import Pair


def check_fit(pairs: Iterable[Pair], base: Checkpoint, mistakes: Mistakes) -> None:
    """Every pair that does not match the base is added to `mistakes`."""
    for pair in pairs:
        mistake = _mistake(pair, base)
        if mistake:
            mistakes.add(*mistake, fix=f"Choose the base that it was trained on; this is {base.path}.")


def _mistake(pair: Pair, base: Checkpoint) -> tuple[str, str] | None:
    target = pair.target
    if target.layer is not None and target.layer >= base.num_layers:
        return f"layers that the base, which has {base.num_layers}, does not have", pair.source
    if target.kind == "routed_experts":
        if target.layer not in base.moe_layers:
            return "routed experts in layers that have none in the base", pair.source
        if target.expert is not None and target.expert >= base.num_experts:
            return f"experts that the base, which has {base.num_experts} a layer, does not have", pair.source
    expected = _expected(pair, base)
    if expected is None:
        return UNKNOWN_MODULE, pair.source
    got = (pair.out_features, pair.in_features)
    if got != expected:
        return "dimensions that do not fit the base", f"{pair.source} is {list(got)}, expected {list(expected)}"
    return None


def _expected(pair: Pair, base: Checkpoint) -> tuple[int, int] | None:
    """(out, in) of the module in the base."""
    target = pair.target
    if target.kind == "routed_experts":
        wide = (base.moe_intermediate_size, base.hidden_size)
        return wide[::-1] if target.projection == "down" else wide
    name = target.module if target.module == "lm_head" else f"model.{target.module}"
    own = f"{name}.weight"
    for candidate in (base.stand_ins.get(own, own), f"{name.replace('.mlp.', '.block_sparse_moe.')}.weight"):
        if candidate in base.tensors and len(base.tensors[candidate].shape) == 2:
            out, inside = base.tensors[candidate].shape
            return (inside, out) if target.module == "embed_tokens" else (out, inside)
    return None
