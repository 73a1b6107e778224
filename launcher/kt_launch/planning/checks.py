"""Checks of the whole plan: conflicting values (conflicts.py), and memory (memory_fit.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kt_launch.planning.command import CAPTURED_BATCHES
from kt_launch.planning.conflicts import Situation, conflicts
from kt_launch.planning.draft import Draft
from kt_launch.planning.experts import chooses_residents, resident_step
from kt_launch.planning.gpu_prefill import KEY as GPU_PREFILL
from kt_launch.planning.gpu_prefill import fit_gpu_prefill
from kt_launch.planning.memory_fit import (
    FRACTIONS,
    Demand,
    Fit,
    estimate,
    most_residents,
    padding_percent,
)
from kt_launch.planning.nearest_fits import nearest_fits
from kt_launch.planning.ranks import HTTP_WORKERS, STAGES, ranks_of, share_of
from kt_launch.planning.threads import fewest_cores, usable_threads
from kt_model.adapter_capacity import count_modules
from kt_model.checkpoint import Checkpoint
from kt_model.flags import requested, typed_flags
from kt_model.printable import is_utf8, printable
from kt_model.units import GIB, gib


def check_conflicts(draft: Draft) -> None:
    """Values that conflict are mistakes; values that combine badly are warnings."""
    base = draft.facts.checkpoint
    if base is None or "kt.threadpool_count" not in draft.resolved:
        return
    for conflict, problem, fix in conflicts(_situation(draft, base)):
        if conflict.refused:
            draft.problems.add(conflict.key, problem, fix)
        else:
            draft.warnings.append(f"{conflict.key}: {problem}" + (f". {fix}" if fix else ""))


def _situation(draft: Draft, base: Checkpoint) -> Situation:
    host, adapters, words = draft.facts.host, draft.facts.adapters, draft.config.server.extra_args
    return Situation(
        method=draft.value("kt.method"),
        threads=draft.value("kt.cpuinfer"),
        pools=draft.value("kt.threadpool_count"),
        nodes=len(share_of(host, draft.config).nodes_in_use) or 1,
        fewest_cores=fewest_cores(share_of(host, draft.config)),
        hidden=base.hidden_size,
        intermediate=base.moe_intermediate_size,
        experts_bytes=base.expert_bytes,
        padding_percent=padding_percent(base),
        device=draft.value("server.device"),
        attention_backend=draft.value("server.attention_backend"),
        lora_backend=draft.value("server.lora_backend"),
        instruction_set=host.instruction_set,
        amx_refused="amx_tile" in host.cpu_flags and not host.amx_permitted,
        places_memory=host.places_memory,
        disk=draft.facts.disk.kind if draft.facts.disk else "unknown",
        adapters=len(adapters),
        lora=draft.has_lora,
        expert_lora=draft.expert_lora,
        max_per_batch=draft.value("lora.max_per_batch") if draft.has_lora else 0,
        cores=usable_threads(host)[0],
        processes=ranks_of(draft.config).here,
        computing=ranks_of(draft.config).computing,
        stages=requested(words, STAGES),
        http_workers=requested(words, HTTP_WORKERS),
        flags=typed_flags(words),
        limits=host.limits,
        max_running_requests=draft.value("server.max_running_requests"),
    )


def resolve_fit(draft: Draft) -> None:
    """How much of each memory the launch needs; if it does not fit, it is refused, or with server.fit=warn a
    warning."""
    base, host = draft.facts.checkpoint, draft.facts.host
    if base is None or "kt.threadpool_count" not in draft.resolved:
        return
    demand = _demand(draft)
    if chooses_residents(draft) and host.gpus:
        demand = _choose_residents(draft, demand, base)
    demand = fit_gpu_prefill(draft, demand, base)
    fit = estimate(demand, base, host)
    if draft.config.server.mem_fraction is None:
        fit = _raise_fraction(draft, demand, base, fit)
    draft.set("fit", fit.needs, "derived: shapes, method, adapters and limits")
    draft.set("fit.free", fit.free, "probed: available memory, cgroup limits")
    draft.warnings += [f"kt.threadpool_count: {budget}: {budget.advice}" for budget in fit.slow]
    if fit.short:
        _tell_misfit(draft, fit, nearest_fits(_demand(draft), base, host))


def _choose_residents(draft: Draft, demand: Demand, base: Checkpoint) -> Demand:
    """As many experts on the GPU as leave the KV cache half of the free memory."""
    step = resident_step(base.num_experts)
    count = most_residents(demand, base, draft.facts.host, step)
    if count:
        draft.set("kt.num_gpu_experts", count, f"derived: what fits beside a KV cache of that size, in steps of {step}")
    return replace(demand, resident=count)


def _demand(draft: Draft) -> Demand:
    device, lora, ranks = draft.value("server.device"), draft.has_lora, ranks_of(draft.config)
    return Demand(
        method=draft.value("kt.method"),
        pools=draft.value("kt.threadpool_count"),
        device=device,
        context_length=draft.value("server.context_length"),
        max_running_requests=draft.value("server.max_running_requests"),
        max_total_tokens=draft.value("server.max_total_tokens"),
        mem_fraction=draft.value("server.mem_fraction"),
        max_rank=draft.value("lora.max_rank") if lora else 0,
        max_per_batch=draft.value("lora.max_per_batch") if lora else 0,
        threads=draft.value("kt.cpuinfer"),
        tensor=ranks.tensor,
        copies=ranks.copies,
        servers=ranks.replicas,
        processes=ranks.here,
        first_has_experts=ranks.first_has_experts,
        expert_ranks=_expert_ranks(draft),
        other_pairs=_other_pairs(draft),
        resident=max(draft.value("kt.num_gpu_experts"), 0),
        streamed=draft.value(GPU_PREFILL) != "off",
        streamed_bytes=int(size * GIB) if (size := draft.value("kt.gpu_prefill_gib")) else None,
        prefill_tokens=draft.value("server.chunked_prefill_size"),
        captured=CAPTURED_BATCHES[-1] if draft.value("server.cuda_graph") == "decode" else 0,
        triton_attention=draft.value("server.attention_backend") == "triton",
        total_is_derived=device == "cpu" and draft.config.server.max_total_tokens is None,
    )


def _expert_ranks(draft: Draft) -> tuple[int, ...]:
    """Ranks of adapters on routed experts; if no adapters are named, the reserved rank for each slot of a batch."""
    named = tuple(adapter.rank for adapter in draft.facts.adapters if adapter.reaches_experts)
    if named or not draft.expert_lora:
        return named
    rank, batch = int(draft.value("lora.max_rank")), int(draft.value("lora.max_per_batch"))
    return (rank,) * max(batch - 1, 1)


def _other_pairs(draft: Draft) -> int:
    """Low-rank pairs outside the routed experts: of the adapters, or of the reserved capacity."""
    counts = [item for adapter in draft.facts.adapters for item in adapter.pair_counts.items()]
    named = sum(count for kind, count in counts if kind != "routed expert")
    base = draft.facts.checkpoint
    if base is None or not draft.config.lora.wants_capacity:
        return named
    return max(named, count_modules(base, draft.value("lora.target_modules")))


def _raise_fraction(draft: Draft, demand: Demand, base: Checkpoint, fit: Fit) -> Fit:
    """Use a larger share of memory for SGLang if the launch fits with it and nobody typed the share."""
    for fraction in FRACTIONS:
        larger = estimate(replace(demand, mem_fraction=fraction), base, draft.facts.host)
        if demand.mem_fraction is not None and fit.short and not larger.short:
            draft.set("server.mem_fraction", fraction, f"derived: {demand.mem_fraction} leaves too little")
            return larger
    return fit


def _tell_misfit(draft: Draft, fit: Fit, changes: Sequence[str]) -> None:
    least = max(budget.needed_bytes - budget.free_bytes for budget in fit.short)
    fix = f"Set {', or '.join(changes)}." if changes else f"No setting fits: {gib(least)} GiB more are needed."
    for budget in fit.short:
        if draft.config.server.fit == "warn":
            draft.warnings.append(f"server.fit: {budget}. {fix}")
        else:
            draft.problems.add("server.fit", str(budget), fix)


def check_names(draft: Draft) -> None:
    """Adds a problem for each folder whose name is not UTF-8: neither a plan nor a request could name it."""
    texts = {key: item.value for key, item in draft.resolved.items() if isinstance(item.value, str)}
    wrong = [key for key, text in texts.items() if not is_utf8(text)]
    for key in [key for key in wrong if key.endswith(".path")] or wrong:
        problem = f"the name of {printable(texts[key])} is not UTF-8"
        draft.problems.add(key, problem, "Rename it, or name it by a link: ln -s FOLDER /a/link.")
