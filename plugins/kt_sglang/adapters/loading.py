"""Adapters loaded at run time: checked like those of a start, then proven, and only then can requests name them. The
answer of /load_lora_adapter reports the findings; a refusal leaves the server unchanged.

In the main process. SGLang's schedulers read the files again for themselves (files.py).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from kt_model.acceptance import (
    NOISE_FACTOR,
    PROMPT,
    SMALLEST_DIFFERENCE,
    TOP_LOGPROBS,
    difference,
)
from kt_model.adapters import AdapterFacts
from kt_model.contract import REPORT, Report, computes_nothing
from kt_model.errors import LaunchError, LaunchErrors, ProofFailed
from kt_model.importer.admission import message_of, require_allowed, require_modules
from kt_model.importer.facts import facts_of
from kt_model.importer.serving import target_modules
from kt_model.methods import method_of
from kt_model.training import Training, read_training
from kt_sglang.adapters.files import (
    FileStates,
    file_states_of,
    forget_read,
    lora_options,
    read_served,
    require_capacity,
)
from kt_sglang.edge.adapters import ASKED
from kt_sglang.edge.run_state import remember_adapters
from kt_sglang.moe.served_checkpoint import served_checkpoint

LOADING: ContextVar[Loading | None] = ContextVar("loading", default=None)
"""The adapter that this asyncio task loads."""
PROVEN: dict[str, tuple[FileStates, dict[str, Any]]] = {}
"""By name, of adapters that requests can name: their files, and what the proof of these found."""
ATTEMPTS = 3
"""Number of attempts: other requests are answered at the same time, and their rows in a batch change the rounding, so
noise may hide a weak adapter once."""


@dataclass
class Loading:
    """One adapter being loaded. proof: the findings, once it was proven."""

    manager: Any
    facts: AdapterFacts
    format: str
    training: Training | None
    file_states: FileStates
    evicted: bool
    """Whether it was loaded before and then evicted by SGLang (--max-loaded-loras): a request is waiting for it."""
    proof: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For the answer."""
        facts, training = self.facts, self.training
        return {
            "name": facts.name,
            "path": str(facts.path),
            "checkpoint": f"{training.chosen} ({training.why})" if training else None,
            "format": self.format,
            "layout": f"{facts.layout} ({facts.layout_why})" if facts.layout else None,
            "rank": facts.rank,
            "scale": facts.scale,
            "reaches": dict(facts.pair_counts),
            "missing_pairs": facts.missing_pairs,
            "warnings": list(facts.warnings),
            "proof": self.proof,
        }


async def around_load_lora_adapter(original: Callable[..., Any], manager: Any, request: Any, *others: Any) -> Any:
    """AROUND hook of `TokenizerManager.load_lora_adapter`, called by the route and for evicted adapters alike."""
    try:
        loading = await asyncio.to_thread(check, manager, request)
        forget_read()
    except (LaunchError, LaunchErrors) as failure:
        return answer(success=False, error_message=message_of(failure))
    request.lora_path = str(loading.facts.path)
    token = LOADING.set(loading)
    try:
        result = await original(manager, request, *others)
    finally:
        LOADING.reset(token)
    if not result.success:
        return result
    PROVEN[loading.facts.name] = loading.file_states, loading.proof
    for gone in PROVEN.keys() - manager.lora_ref_cache.keys():
        del PROVEN[gone]
    loaded = result.loaded_adapters
    remember_adapters({name: reference.lora_path for name, reference in manager.lora_ref_cache.items()})
    return answer(success=True, error_message="", loaded_adapters=loaded, adapter=loading.as_dict())


def check(manager: Any, request: Any) -> Loading:
    """All checks that do not need SGLang. Raises LaunchError or LaunchErrors."""
    if request.lora_name in manager.lora_registry.get_all_adapters():
        fix = "Choose another name, or unload that one by /unload_lora_adapter."
        raise LaunchError("lora_name", f"an adapter {request.lora_name} is already loaded", fix)
    if not manager.enable_lora:
        fix = "Start it with lora.allow=[/path/to/adapters], and lora.max_rank for ranks above 16."
        raise LaunchError("lora_path", "this server has no capacity for adapters", fix)
    folder = require_allowed(request.lora_path, allowed_folders())
    training = read_training(Path(request.lora_path))
    imported = read_served(str(folder))
    facts = facts_of(request.lora_name, imported, served_checkpoint())
    require_capacity(imported, str(imported.path))
    require_room(target_modules(imported), str(imported.path))
    require_one_replica()
    known = manager.lora_ref_cache.get(request.lora_name)
    evicted = known is not None and os.path.realpath(known.lora_path) == str(facts.path)
    return Loading(manager, facts, imported.format, training, file_states_of(facts.path), evicted)


def allowed_folders() -> list[Path]:
    """The plan's allowed folders, and the adapters that the server was started with."""
    from sglang.srt.runtime_context import get_lora

    homes = [Path(home) for home in lora_options().get("allow", ())]
    started = [Path(each.lora_path) for each in get_lora().lora_paths or ()]
    return [*homes, *(each for each in started if not any(each.is_relative_to(home) for home in homes))]


def require_room(reached: set[str], path: str) -> None:
    """Raise LaunchError for modules outside the server's capacity."""
    from sglang.srt.runtime_context import get_lora

    kept = get_lora().lora_target_modules
    if kept is not None and "all" not in kept:
        require_modules(reached, kept, path)


def require_one_replica() -> None:
    """Raise LaunchError if SGLang would answer the request with an assertion."""
    from sglang.srt.runtime_context import get_parallel

    if get_parallel().dp_size != 1:
        problem = "SGLang cannot load adapters into a server with several replicas (server.dp)"
        raise LaunchError("lora_path", problem, "Give them at the start.")


def answer(**values: Any) -> Any:
    """SGLang's own answer, plus the findings about the adapter."""
    return _answers()(**values)


@cache
def _answers() -> type[Any]:
    from sglang.srt.managers.io_struct import LoRAUpdateOutput

    class Answer(LoRAUpdateOutput, kw_only=True):  # type: ignore[misc, call-arg]  # a struct of msgspec
        adapter: dict[str, Any] | None = None

    return Answer


async def around_register(original: Callable[..., Any], registry: Any, reference: Any) -> Any:
    """AROUND hook of `LoRARegistry.register`, which makes a name usable: by then the schedulers have the adapter, so it
    is proven first. Raises ValueError, which SGLang answers with 400."""
    loading = LOADING.get()
    if loading is not None:
        try:
            loading.proof = await prove(loading, reference.lora_id)
        except ProofFailed as failure:
            await take_back(loading.manager, reference)
            raise ValueError(message_of(failure)) from failure
        except BaseException:
            await take_back(loading.manager, reference)
            raise
    return await original(registry, reference)


async def take_back(manager: Any, reference: Any) -> None:
    """Unload an adapter that got no name from the schedulers. If that fails, its name stays reserved, as SGLang does
    it."""
    from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqInput

    name, adapter = reference.lora_name, reference.lora_id
    request = UnloadLoRAAdapterReqInput(lora_name=name, lora_id=adapter)
    results = await manager.update_lora_adapter_communicator(request)
    if not all(result.success for result in results):
        manager.pending_lora_unloads[name] = adapter


# The proof: that of a start (kt_launch/proving/proof.py), run from inside. No cache is flushed, since other requests
# are being answered: SGLang keeps the prefixes of each adapter separate, and a new one has none.


async def prove(loading: Loading, adapter: str) -> dict[str, Any]:
    """The findings. adapter: SGLang's id. Raises ProofFailed."""
    manager = loading.manager
    file_states, proof = PROVEN.get(loading.facts.name, (None, {}))
    if loading.evicted and loading.file_states == file_states:
        return proof
    if manager.is_pause:
        raise ProofFailed("lora_path", "the server is paused, so the adapter cannot be proven", "Resume it first.")
    token = ASKED.set(None)  # the request that waits for an evicted adapter names one, the proof does not
    try:
        found, noise = await require_difference(manager, adapter)
    finally:
        ASKED.reset(token)
    reports = [state[REPORT] for state in await manager.get_internal_state()]
    ranks = [rank for report in reports for rank in (report, *report["others"])]
    errors = [reference_error(rank, adapter, loading) for rank in ranks]
    known = [error for error in errors if error is not None]
    return {"acts": True, "difference": found, "noise": noise, "reference_error": max(known) if known else None}


async def require_difference(manager: Any, adapter: str) -> tuple[float, float]:
    """Largest |Δ logprob| of the first token between adapter and base, and between two runs of the base. Raises
    ProofFailed if the adapter has no effect."""
    for _ in range(ATTEMPTS):
        base = await first_token_logprobs(manager, None)
        noise = difference(base, await first_token_logprobs(manager, None))
        found = difference(base, await first_token_logprobs(manager, adapter))
        smallest = max(SMALLEST_DIFFERENCE, NOISE_FACTOR * noise)
        if found > smallest:
            return found, noise
    problem = (
        f"base and adapter give the same first-token logprobs (largest difference {found:.2g}, expected more than "
        f"{smallest:.2g}): the adapter does nothing"
    )
    raise ProofFailed("lora_path", problem, "Its B matrices are zero, or it is not the trained one.")


def reference_error(report: Report, adapter: str, loading: Loading) -> float | None:
    """Relative L2 error of one of the adapter's tokens in one layer, recomputed in float32 in the scheduler; None if
    nothing could be compared. Raises ProofFailed."""
    checked = report["checked_adapters"]
    if computes_nothing(report):
        return None
    if adapter not in checked and "routed expert" in loading.facts.pair_counts:
        problem = "the adapter reaches routed experts, but none of its rows went through kt_kernels"
        raise ProofFailed("lora_path", problem, "Report this with the server's log.")
    error, limit = checked.get(adapter), method_of(report["layers"][0]["method"]).reference_limit
    if error is not None and not error <= limit:
        problem = f"one of its tokens, recomputed in float32, is off by {error:.2g} (relative L2), expected {limit:g}"
        raise ProofFailed("lora_path", problem, "Run kt-launch doctor, then report it.")
    return error


async def first_token_logprobs(manager: Any, adapter: str | None) -> dict[int, float]:
    """Token id → logprob of the most probable first tokens after the proof's prompt. The adapter is given by its id,
    since it has no name yet."""
    from fastapi import HTTPException
    from sglang.srt.managers.io_struct import GenerateReqInput

    asked = GenerateReqInput(
        text=PROMPT,
        sampling_params={"max_new_tokens": 1, "temperature": 0.0},
        return_logprob=True,
        top_logprobs_num=TOP_LOGPROBS,
        lora_id=adapter,
    )
    try:
        (found,) = [out async for out in manager.generate_request(asked)]
    except HTTPException as failure:
        who = "the base model" if adapter is None else "it"
        raise ProofFailed("lora_path", f"{who} cannot answer: {failure.detail}", "Check its weights.") from failure
    return {token: logprob for logprob, token, _ in found["meta_info"]["output_top_logprobs"][0]}
