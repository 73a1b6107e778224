"""Reads everything a plan needs, in the order that a reader expects, and resolves it. Every LaunchPlan is made here."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_launch.config.dump import FILE_VARIABLE
from kt_launch.config.schema import Config, Lora, Server
from kt_launch.config.sources import Sources
from kt_launch.machine.allocation import HostPlace, read_place
from kt_launch.machine.host import LOOPBACK, Host, Route, read_disk, read_host, route_to
from kt_launch.machine.ports import Port, probe_port
from kt_launch.planning.device import check_installed
from kt_launch.planning.draft import INTERFACE_VARIABLES, Facts
from kt_launch.planning.locate import LocatedFolder, locate_adapters, locate_allowed, locate_model
from kt_launch.planning.memory_fit import shard_bytes
from kt_launch.planning.ranks import ranks_of, share_of
from kt_launch.planning.resolve import resolve
from kt_launch.planning.threads import most_threads, usable_pools, usable_threads
from kt_model.adapters import AdapterFacts
from kt_model.checkpoint import Checkpoint, read_checkpoint
from kt_model.completeness import require_whole
from kt_model.errors import Problems
from kt_model.expert_profile import ExpertProfile, chosen_name, read_profile
from kt_model.generation import Generation, read_generation
from kt_model.methods import method_of
from kt_model.plan import LaunchPlan
from kt_model.user_paths import absolute

if TYPE_CHECKING:
    from kt_model.experts import ExpertSource
    from kt_model.weights.folder import ExpertFolder
    from kt_model.weights.locations import Experts
    from kt_model.weights.packed import CacheStatus

STARTING = ("serve", "bench", "chat", "replay")
"""Actions that start a server from the plan; a replay does so unless it is only to report."""
READ_BEFORE_START_BYTES = 4 << 30
"""Of a checkpoint's experts; reading more would delay a first start by more than seconds."""


def prepare(config: Config, sources: Sources, problems: Problems, reader: Callable[[], Host] = read_host) -> LaunchPlan:
    """The plan of one launch, or every mistake in it at once."""
    host = reader()
    if _starts(config):
        check_installed(host, problems, config.server.device)
    if config.model.hub or any(adapter.hub for adapter in config.lora.adapters.values()):
        from kt_launch.gathering.hub import fetch

        fetch(config, lambda: host, problems)
    facts = read_facts(config, sources, problems, host)
    plan = resolve(config, facts, sources, problems)
    if not os.environ.get(FILE_VARIABLE):
        return plan
    from kt_launch.gathering.drift import differences_since_saved

    return replace(plan, warnings=(*plan.warnings, *differences_since_saved(plan, os.environ)))


def _starts(config: Config) -> bool:
    return config.action.name in STARTING and (config.action.name != "replay" or config.replay.start)


def read_facts(config: Config, sources: Sources, problems: Problems, host: Host) -> Facts:
    """Machine, port, checkpoint and adapters; what cannot be read is reported as a mistake, and the rest is still
    read."""
    model, checkpoint = _read_model(config, sources, problems)
    folders = locate_adapters(config, sources, os.environ, problems)
    experts = _find_experts(config, checkpoint, sources, problems)
    profile = _read_profile(config, checkpoint, problems)
    place = _find_place(config.server)
    return Facts(
        host=host,
        port=probe_port(config.server.host, config.server.port),
        metrics_port=_probe(config.server.host, config.server.metrics_port),
        playground_port=_probe(LOOPBACK, config.server.playground_port),
        adapters_port=_probe(config.server.host, config.server.adapters_port),
        model=model,
        checkpoint=checkpoint,
        adapters=_read_adapters(folders, checkpoint, config.lora, problems),
        packed=_find_packed(config, checkpoint, experts.path if experts else None, profile, host, problems),
        expert_profile=profile,
        generation=_read_generation(checkpoint, problems),
        adapter_folders={folder.name: folder for folder in folders},
        allowed=locate_allowed(config, sources, os.environ, problems, folders),
        experts=experts,
        environ={name: os.environ[name] for name in os.environ if name.startswith(("SGLANG_", *INTERFACE_VARIABLES))},
        place=place,
        route=_find_route(config.server, place),
        router=config.server.replicas == 1 or find_spec("sglang_router") is not None,
        disk=read_disk(checkpoint.path) if checkpoint else None,
        transformers=find_spec("transformers") is not None,
    )


def _find_place(server: Server) -> HostPlace:
    """This host among several; empty for a server on one host, even if a batch system numbers hosts."""
    return read_place(os.environ) if server.nodes > 1 else HostPlace()


def _host_number(server: Server) -> int:
    return (_find_place(server).number or 0) if server.node_rank is None else server.node_rank


def _find_route(server: Server, place: HostPlace) -> Route | None:
    meeting = server.rendezvous or place.meeting
    if server.nodes == 1 or not meeting:
        return None
    return route_to(meeting.rpartition(":")[0].strip("[]"))


def _probe(host: str, number: int | None) -> Port | None:
    return None if number is None else probe_port(host, number)


def _read_model(config: Config, sources: Sources, problems: Problems) -> tuple[LocatedFolder | None, Checkpoint | None]:
    folder = None
    with problems.collect("model.path"):
        folder = locate_model(config, sources, os.environ)
        checkpoint = read_checkpoint(folder.path)
        require_whole(checkpoint, "model.path")
        return folder, checkpoint
    return folder, None


def _read_generation(base: Checkpoint | None, problems: Problems) -> Generation | None:
    if base is None:
        return None
    with problems.collect("model.path"):
        return read_generation(base.path, base.config)
    return None


def _read_adapters(
    folders: list[LocatedFolder], base: Checkpoint | None, lora: Lora, problems: Problems
) -> list[AdapterFacts]:
    if not folders:
        return []
    from kt_model.importer.facts import read_adapter

    read = []
    for folder in folders:
        with problems.collect(folder.key):
            options: dict[str, Any] = {"allow_missing": lora.allow_missing, "ignore": lora.ignore}
            options["layout"] = folder.layout
            read.append(read_adapter(folder.name, folder.path, base, where=folder.key, **options))
    return read


def _find_experts(config: Config, base: Checkpoint | None, sources: Sources, problems: Problems) -> Experts | None:
    """The folder of quantized experts, if the method needs one: checked, and with kt.prepare quantized if it is
    missing.

    Actions that start no server quantize nothing; they get the folder that would be made. So does a start that lacks
    torch, which check_installed refuses.
    """
    method = config.kt.method
    if base is None or not method_of(method).quantized:
        return None
    from kt_launch.gathering.quantized import missing_folder
    from kt_model.digests import Digests
    from kt_model.experts import ExpertSource, fingerprint
    from kt_model.installed import missing_packages
    from kt_model.weights.folder import read_folder, verify_hashes
    from kt_model.weights.locations import Experts, choose_folder

    with problems.collect("kt.weight_path"):
        source = ExpertSource(base)
        given, prepare = config.kt.weight_path, config.kt.prepare
        typed = Experts(absolute(given), sources.of("kt.weight_path")) if given else None
        experts = typed or choose_folder(source, method, prepare)
        starts = _starts(config)
        if not experts.path.exists():
            if not prepare:
                raise missing_folder(method, sources, experts, given)
            if not starts or missing_packages():
                return experts
            from kt_model.weights.quantizing import quantize

            quantize(source, method, experts.path, config.kt.cpuinfer or usable_threads(read_host())[0])
        found = read_folder(experts.path, method, base, fingerprint=fingerprint(source))
        _require_same_weights(source, found, starts)
        if starts:
            with Digests() as digests:
                verify_hashes(found, digests.sha256)
        return experts
    return None


def _require_same_weights(source: ExpertSource, folder: ExpertFolder, starts: bool) -> None:
    """Raise LaunchError if the experts were made from weights other than the checkpoint's. Before a start, unread
    weights are read if that takes seconds; otherwise they are read while the server starts (lock.py)."""
    from kt_model.weights.identity import known_weights, read_weights, require_same_weights

    reads = starts and folder.manifest.weights is not None and source.expert_bytes() <= READ_BEFORE_START_BYTES
    weights = read_weights(source) if reads else known_weights(source)
    require_same_weights(folder.path, folder.manifest.weights, source, weights)


def _read_profile(config: Config, base: Checkpoint | None, problems: Problems) -> ExpertProfile | None:
    path = config.kt.expert_profile
    if path is None or base is None:
        return None
    with problems.collect("kt.expert_profile"):
        return read_profile(absolute(path), base.num_experts)
    return None


def _find_packed(
    config: Config,
    base: Checkpoint | None,
    experts: Path | None,
    profile: ExpertProfile | None,
    host: Host,
    problems: Problems,
) -> CacheStatus | None:
    """What the packed cache holds for this launch, or for its first process on this host; reads no weights."""
    method = config.kt.method
    weights = experts if base is None or method_of(method).quantized else base.path
    share = share_of(host, config)
    threads = config.kt.cpuinfer or usable_threads(share)[0]
    pools = config.kt.threadpool_count or usable_pools(share, threads)
    count = _known_residents(config, host)
    if (
        config.kt.packed_cache == "off"
        or count is None
        or base is None
        or weights is None
        or not 1 <= pools <= threads <= most_threads(host)
    ):
        return None
    import kt_kernels
    from kt_model.weights.packed import CacheKey, cache_status

    with problems.collect("kt.packed_cache"):
        pool = kt_kernels.ThreadPool(threads, nodes=pools)
        layout = kt_kernels.packed_layout(method=method_of(method).sglang_name, pool=pool)
        ranks = ranks_of(config)
        part = (_host_number(config.server) * ranks.here if ranks.expert_parts > 1 else 0, ranks.expert_parts)
        cache_key = CacheKey(weights, method, layout, chosen_name(profile, count), *part)
        return cache_status(cache_key, sum(shard_bytes(method, base, pools, base.num_experts - count)))
    return None


def _known_residents(config: Config, host: Host) -> int | None:
    """Experts that a GPU will hold; None if that depends on how many fit."""
    count = config.kt.num_gpu_experts
    if count != "auto":
        return max(count or 0, 0)
    on_gpu = config.server.device != "cpu" and host.gpus and host.cuda_torch
    return None if on_gpu and not config.kt.record_experts else 0
