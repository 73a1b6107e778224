"""Long prompts on a GPU: whether their experts may be streamed there, through how large buffers, and how many tokens
are processed at once. The server measures from how many tokens on that is faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from kt_launch.planning.draft import Draft
from kt_launch.planning.memory_fit import Demand, coming_buffers, coming_bytes, estimate
from kt_launch.planning.ranks import EXPERTS_KEY, ranks_of
from kt_model.units import GIB, gib

if TYPE_CHECKING:
    from kt_model.checkpoint import Checkpoint

KEY, SIZE_KEY = "kt.gpu_prefill_tokens", "kt.gpu_prefill_gib"
CHUNK = 8192
"""Prompt tokens per step if experts are streamed: all experts are streamed once a step, and requests that are decoding
wait for it. SGLang's own default on GPUs of this size."""
ROOMY_BYTES = 60 << 30
TRIED_METHODS = ("bf16", "int8", "int4")


def resolve_gpu_prefill(draft: Draft) -> None:
    kt = draft.config.kt
    if draft.value("server.device") == "cpu":
        draft.set(KEY, "off", "derived: there is no GPU to bring experts to")
    elif ranks_of(draft.config).first_has_experts:
        _leave_out(draft)
    elif kt.gpu_prefill_tokens is None and (untried := _untried(draft)):
        draft.set(KEY, "off", f"derived: {untried} has not run on a card this way; auto tries it")
    else:
        draft.keep_or(KEY, "auto", "derived: measured and proven at each start")
    usual = "default: up to about 1.5, at least two experts and one unpacked"
    draft.set(SIZE_KEY, kt.gpu_prefill_gib, draft.sources.of(SIZE_KEY) if kt.gpu_prefill_gib else usual)
    chunk = CHUNK if draft.value(KEY) != "off" and _is_roomy(draft) else None
    draft.keep_or("server.chunked_prefill_size", chunk, "derived: all experts come to the GPU once a step")
    _require_reachable(draft)


def _require_reachable(draft: Draft) -> None:
    most, wanted = draft.value("server.chunked_prefill_size"), draft.value(KEY)
    if most and isinstance(wanted, int) and wanted > most:
        problem = f"{wanted}, but a step takes at most {most} tokens (server.chunked_prefill_size)"
        draft.problems.add(KEY, problem, f"Set {KEY} to {most} or less, or server.chunked_prefill_size to {wanted}.")


def _leave_out(draft: Draft) -> None:
    """One card would have all to bring, and the others wait for it."""
    why = f"with {EXPERTS_KEY}=rank0 only the first GPU has experts to bring"
    draft.set(KEY, "off", f"derived: {why}")
    if (given := draft.config.kt.gpu_prefill_tokens) not in (None, "off"):
        draft.problems.add(KEY, f"{given}, but {why}", f"Leave it out, or set {EXPERTS_KEY}=split.")


def _untried(draft: Draft) -> str:
    """The part of the plan that has never been run on a GPU with streamed experts; '' if all of it has."""
    kt, server = draft.config.kt, draft.config.server
    if kt.method not in TRIED_METHODS:
        return f"kt.method={kt.method}"
    return "server.nodes" if server.nodes > 1 else "server.dp" if server.dp > 1 else ""


def _is_roomy(draft: Draft) -> bool:
    gpus = draft.facts.host.gpus
    return bool(gpus) and gpus[0].memory_bytes >= ROOMY_BYTES


def fit_gpu_prefill(draft: Draft, demand: Demand, base: Checkpoint) -> Demand:
    """The demand with buffers that fit: of the typed size, else the usual ones or the largest smaller ones. If none do,
    long prompts stay on the CPU, or the demand stays as it is for a typed number of tokens, or without room anyway."""
    if demand.streamed_bytes and demand.streamed and coming_buffers(demand, base) is None:
        _refuse_size(draft, demand, base)
        return demand
    without, host = replace(demand, streamed=False), draft.facts.host
    if not estimate(demand, base, host).short or estimate(without, base, host).short:
        return demand
    smaller = [] if demand.streamed_bytes else list(_smaller_sizes(demand, base))
    for size in smaller:
        wanted = _with_size(demand, size)
        if not estimate(wanted, base, host).short:
            _set_size(draft, wanted, base, size)
            return wanted
    if draft.value(KEY) != "auto":
        return demand
    _turn_off(draft, coming_bytes(_with_size(demand, smaller[-1]) if smaller else demand, base), bool(smaller))
    return without


def _refuse_size(draft: Draft, demand: Demand, base: Checkpoint) -> None:
    usual = replace(demand, streamed_bytes=None)
    least = [_hundredths(coming_bytes(usual, base)), *_smaller_sizes(usual, base)][-1]
    problem = f"{gib(demand.streamed_bytes or 0)}, but two experts of this model and one unpacked take more"
    draft.problems.add(SIZE_KEY, problem, f"Set {SIZE_KEY}={least / 100:g}.")


def _smaller_sizes(demand: Demand, base: Checkpoint) -> Iterator[int]:
    """What smaller buffers than the usual ones take, in hundredths of a GiB, descending."""
    found = coming_buffers(demand, base)
    while found is not None:
        found = coming_buffers(replace(demand, streamed_bytes=found.bytes - 1), base)
        if found is not None:
            yield _hundredths(found.bytes)


def _hundredths(size: int) -> int:
    """Of a GiB, that hold so many bytes."""
    return -(-size * 100 // GIB)


def _with_size(demand: Demand, hundredths: int) -> Demand:
    return replace(demand, streamed_bytes=int(hundredths / 100 * GIB))


def _set_size(draft: Draft, demand: Demand, base: Checkpoint, hundredths: int) -> None:
    found = coming_buffers(demand, base)
    assert found is not None
    experts = "1 expert" if found.experts == 1 else f"{found.experts} experts"
    source = f"derived: the most that fits beside the rest: {found.count} pieces of {experts}, and one unpacked"
    draft.set(SIZE_KEY, hundredths / 100, source)


def _turn_off(draft: Draft, needed: int, is_least: bool) -> None:
    which = "buffers, the smallest," if is_least else "buffers"
    why = f"the {gib(needed)} GiB of {which} do not fit on the GPU"
    draft.set(KEY, "off", f"derived: {why}")
    draft.warnings.append(f"{KEY}: off, because {why}; long prompts are computed at the speed of the CPU")
