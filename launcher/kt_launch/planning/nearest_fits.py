"""Settings to type where a launch does not fit into memory: those nearest to what was asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kt_launch.planning.memory_fit import FRACTIONS, Demand, estimate
from kt_model.methods import METHODS

if TYPE_CHECKING:
    from kt_launch.machine.host import Host
    from kt_model.checkpoint import Checkpoint

TOKEN_STEP = 512
"""Suggested numbers of tokens are multiples of this."""

Check = Callable[[Demand], bool]


def nearest_fits(demand: Demand, base: Checkpoint, host: Host, most: int = 3) -> list[str]:
    """Settings to type, each of which alone (else the first two together) makes the launch fit; nearest first."""

    def fits(changed: Demand) -> bool:
        return not estimate(changed, base, host).short

    found = [setting for setting, changed in _single_changes(demand, base, fits) if fits(changed)]
    if found:
        return _one_a_key(found)[:most]
    return next(([setting] for setting, changed in _double_changes(demand, base, fits) if fits(changed)), [])


def _one_a_key(settings: Sequence[str]) -> list[str]:
    """The first, which is the nearest, for each key."""
    by_key: dict[str, str] = {}
    for setting in settings:
        by_key.setdefault(setting.partition("=")[0], setting)
    return list(by_key.values())


def _single_changes(demand: Demand, base: Checkpoint, fits: Check) -> Iterator[tuple[str, Demand]]:
    """Settings that need less memory, those that cost the user least first."""
    for fraction in FRACTIONS:
        if demand.mem_fraction is not None and fraction > demand.mem_fraction:
            yield f"server.mem_fraction={fraction}", replace(demand, mem_fraction=fraction)
    if demand.streamed:
        yield "kt.gpu_prefill_tokens=off", replace(demand, streamed=False)
    yield from _fewer_residents(demand, base, fits)
    yield from _smaller_cache(demand, base, fits)
    for slots in range(demand.max_per_batch - 1, 1, -1):
        yield f"lora.max_per_batch={slots}", replace(demand, max_per_batch=slots)
    yield from _smaller_methods(demand)


def _fewer_residents(demand: Demand, base: Checkpoint, fits: Check) -> Iterator[tuple[str, Demand]]:
    yield from _largest(demand, "kt.num_gpu_experts", "resident", 1, fits)
    if demand.resident:
        yield "kt.num_gpu_experts=0", replace(demand, resident=0)


def _smaller_cache(demand: Demand, base: Checkpoint, fits: Check) -> Iterator[tuple[str, Demand]]:
    if demand.total_is_derived:
        yield from _largest(demand, "server.max_running_requests", "max_running_requests", 1, fits)
    else:
        yield from _largest(demand, "server.max_total_tokens", "max_total_tokens", TOKEN_STEP, fits)
    with_context = replace(demand, context_length=demand.context_length or base.max_position)
    yield from _largest(with_context, "server.context_length", "context_length", TOKEN_STEP, fits)


def _largest(demand: Demand, key: str, field: str, step: int, fits: Check) -> Iterator[tuple[str, Demand]]:
    """The largest multiple of a step below the present value that fits, if there is one."""

    def change(count: int) -> Demand:
        changed: dict[str, Any] = {field: count * step}
        return _with_cache(replace(demand, **changed))

    low, high = 0, ((getattr(demand, field) or 0) - 1) // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(change(middle)) else (low, middle - 1)
    if low:
        yield f"{key}={low * step}", change(low)


def _with_cache(demand: Demand) -> Demand:
    """The cache follows context and requests unless somebody typed its size."""
    if not demand.total_is_derived or not demand.context_length or not demand.max_running_requests:
        return demand
    return replace(demand, max_total_tokens=demand.context_length * demand.max_running_requests)


def _smaller_methods(demand: Demand) -> Iterator[tuple[str, Demand]]:
    methods = [*METHODS]
    for method in methods[methods.index(demand.method) + 1 :]:
        yield f"kt.method={method}", replace(demand, method=method)


def _double_changes(demand: Demand, base: Checkpoint, fits: Check) -> Iterator[tuple[str, Demand]]:
    """A smaller method plus one more change; the largest method that is enough comes first."""
    for method, smaller in _smaller_methods(demand):
        for change, changed in _single_changes(smaller, base, fits):
            if not change.startswith("kt.method"):
                yield f"{method} {change}", changed
