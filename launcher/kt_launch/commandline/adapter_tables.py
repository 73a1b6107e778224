"""A description of an adapter: the facts of an import as plain values or as tables. Decides nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kt_launch.commandline.terminal import WHOLE, folded, print_table
from kt_model.checkpoint import Checkpoint
from kt_model.cpulist import show_cpu_list
from kt_model.importer.names import PROJECTIONS
from kt_model.importer.normal import KINDS, Imported, Pair
from kt_model.importer.reading import FORMATS
from kt_model.importer.serving import lead_scale, unserved_parts
from kt_model.printable import say


def report(imported: Imported, base: Checkpoint | None) -> dict[str, Any]:
    """Plain values, ready for JSON. Without a base, the number of experts is inferred from the largest one that the
    adapter names."""
    num_experts = base.num_experts if base else _largest_expert(imported) + 1
    pairs = list(imported.pairs.values())
    return {
        "path": str(imported.path),
        "format": imported.format,
        "format_name": FORMATS[imported.format],
        "base": str(base.path) if base else None,
        "layout": str(imported.order) if imported.order else None,
        "layout_source": imported.order.why if imported.order else None,
        "keys": _keys(imported),
        "ranks": {part: sorted({pair.rank for pair in found}) for part, found in _parts(pairs)},
        "scale": lead_scale(pairs),
        "scales": {part: sorted({pair.scale for pair in found}) for part, found in _parts(pairs)},
        "layers": sorted({pair.target.layer for pair in pairs if pair.target.layer is not None}),
        "expert_layers": imported.expert_layers,
        "experts": num_experts,
        "experts_covered": _covered(imported),
        "zero_filled": imported.zero_filled(num_experts),
        "delta_norms": {part: _norms(found) for part, found in _parts(pairs)},
        "bytes": imported.bytes,
        "not_served": unserved_parts(imported, base),
        "refused": dict(imported.refused),
        "warnings": list(imported.warnings),
        "errors": [str(problem) for problem in imported.problems],
    }


def _keys(imported: Imported) -> dict[str, int]:
    """Every key once."""
    counts = {kind: imported.keys.get(kind, 0) for kind in KINDS}
    counts["refused"] = len(imported.refused)
    return {"total": sum(counts.values()), **counts}


def _largest_expert(imported: Imported) -> int:
    return max((pair.target.expert or 0 for pair in imported.of_kind("routed_experts")), default=-1)


def _parts(pairs: Iterable[Pair]) -> list[tuple[str, list[Pair]]]:
    """The projections of routed experts, then the other kinds that occur."""
    parts: dict[str, list[Pair]] = {name: [] for name in (*PROJECTIONS, *KINDS)}
    for pair in pairs:
        parts[pair.target.projection if pair.target.kind == "routed_experts" else pair.target.kind].append(pair)
    return [(name, found) for name, found in parts.items() if found]


def _covered(imported: Imported) -> dict[str, int]:
    """Layer -> how many of its experts have LoRA weights."""
    experts: dict[int, set[int]] = {}
    for (layer, _), found in imported.experts.items():
        experts.setdefault(layer, set()).update(found)
    return {str(layer): len(experts[layer]) for layer in sorted(experts)}


def _norms(pairs: list[Pair]) -> dict[str, float]:
    norms = [pair.norm() for pair in pairs]
    return {"smallest": min(norms), "mean": sum(norms) / len(norms), "largest": max(norms)}


def print_report(name: str, facts: dict[str, Any]) -> None:
    """Prints tables for people."""
    say(f"{name}: {facts['path']}")
    if facts["checkpoint"]:
        say(f"{facts['checkpoint']} ({facts['checkpoint_source']})")
    print(f"format {facts['format']}, {facts['format_name']}; scale {facts['scale']:g}; {facts['bytes']} bytes")
    if facts["layout"]:
        print(f"columns of B in fused experts: {facts['layout']} ({facts['layout_source']})")
    covered = set(facts["experts_covered"].values())
    experts = f"{min(covered)} to {max(covered)}" if len(covered) > 1 else str(*covered)
    if covered:
        print(f"layers {show_cpu_list(facts['expert_layers'])}: {experts} of {facts['experts']} experts each")
    print(f"expert projections without LoRA weights, served as zero: {facts['zero_filled']}\n")
    print_table(("keys", "count"), [(part, str(count)) for part, count in facts["keys"].items()])
    print()
    header = ("part", "rank", "scale", "‖ΔW‖ min", "mean", "max")
    print_table(header, [_row(part, facts) for part in facts["ranks"]])
    for part, why in facts["not_served"].items():
        say(f"\nnot served: {part}: {why}")
    if facts["not_served"]:
        say(f"lora.ignore=[{','.join(facts['not_served'])}] serves the rest")
    for warning in facts["warnings"]:
        say(f"\nwarning: {warning}")
    if loading := facts["loading"]:
        say(folded(f"\na running server {_answer(loading)}", WHOLE), kept="\n")
    print()


def _answer(loading: dict[str, Any]) -> str:
    """What loading it into a server would do."""
    if not loading["success"]:
        return f"refuses to load it: {loading['error_message']}"
    needs = f" that was started with {' '.join(loading['needs'])}" if loading["needs"] else ""
    return f"{needs.strip()} loads it, if it acts" if needs else "of these keys loads it, if it acts"


def _row(part: str, facts: dict[str, Any]) -> tuple[str, ...]:
    ranks = ", ".join(str(rank) for rank in facts["ranks"][part])
    scales = ", ".join(f"{scale:g}" for scale in facts["scales"][part])
    return (part, ranks, scales, *(f"{value:.4g}" for value in facts["delta_norms"][part].values()))
