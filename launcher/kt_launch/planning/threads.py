"""The expert threads: how many, in how many pools, and on which CPUs each pool runs."""

from __future__ import annotations

import math
from typing import Any

from kt_launch.machine.host import Host
from kt_launch.planning.draft import Draft
from kt_launch.planning.ranks import Ranks, ranks_of, share_of
from kt_model.cpulist import show_cpu_list


def resolve_threads(draft: Draft) -> None:
    ranks = ranks_of(draft.config)
    host, processes = share_of(draft.facts.host, draft.config), ranks.computing
    threads, source = usable_threads(host)
    if spare := spare_cores(threads, ranks) if draft.value("server.device") == "cuda" else 0:
        threads -= spare
        source += f", less {spare} for the processes of server.tp and NCCL"
    if processes > 1:
        source += f", for each of {processes} processes"
    count = draft.keep_or("kt.cpuinfer", threads, source)
    most = most_threads(host)
    if not 1 <= count <= most:
        problem = f"{count} threads, but 1 to {most} are expected ({source.removeprefix('probed: ')})"
        draft.problems.add("kt.cpuinfer", problem, f"Set kt.cpuinfer={threads}, or leave it out.")
        return
    if count > threads:
        cores = f"{threads + spare} physical cores"
        problem = f"leave {threads + spare - count} of {cores} to the processes of server.tp and NCCL"
        warning = problem if count <= threads + spare and spare else f"share {cores}"
        draft.warnings.append(f"kt.cpuinfer: {count} threads {warning}; {threads} is usually faster")
    _resolve_pools(draft, host, count)


def _resolve_pools(draft: Draft, host: Host, threads: int) -> None:
    pools, source = usable_pools(host, threads), f"probed: {count_nodes(host)} in use"
    count = draft.keep_or("kt.threadpool_count", pools, source)
    if not 1 <= count <= threads:
        problem = f"{count} pools for {threads} threads, but 1 to {threads} are expected"
        draft.problems.add("kt.threadpool_count", problem, f"Set kt.threadpool_count={pools}, or leave it out.")
        del draft.resolved["kt.threadpool_count"]
        return
    draft.set("kt.pools", pool_places(host, threads, count), "derived: kt.cpuinfer, kt.threadpool_count")
    draft.set("kt.instruction_set", draft.facts.host.instruction_set, f"probed: {draft.facts.host.cpu_model}")


def usable_threads(host: Host) -> tuple[int, str]:
    """How many expert threads the machine can use, and why."""
    cores = host.usable_cores or len(host.affinity) or 1
    bounds = [f"{cores} usable physical cores", f"affinity to {len(host.affinity)} CPUs"]
    threads = min(cores, len(host.affinity) or cores)
    if host.quota_cpus is not None:
        bounds.append(f"a cgroup quota of {host.quota_cpus:g} CPUs")
        threads = min(threads, max(1, math.floor(host.quota_cpus)))
    return threads, f"probed: {', '.join(bounds)}"


def spare_cores(threads: int, ranks: Ranks) -> int:
    """Of so many cores for one process with experts on a GPU host, those that its threads leave to the processes of
    server.tp, which talk to each other in every layer, and to NCCL's threads; at most half.

    Measured with two H200 on 32 cores: 28 threads of kt.tp_experts=rank0 took 11.8 ms a step where 30 took 28.7, all of
    it in the experts; split with one core free of each 16 took 13.5. A single process has nobody to wait for: its
    threads yield to its scheduler, and all cores are best.
    """
    return 0 if ranks.tensor == 1 else min(cores_beside(ranks) // ranks.computing, threads // 2)


def cores_beside(ranks: Ranks) -> int:
    """Cores for this host's processes themselves, beside their expert threads: two for each where some wait for the
    experts of another one, else one."""
    return ranks.here * (2 if ranks.computing < ranks.here else 1)


def usable_pools(host: Host, threads: int) -> int:
    """How many pools that many threads form on this machine: one per NUMA node in use."""
    return min(len(host.nodes_in_use) or 1, threads)


def count_nodes(host: Host) -> str:
    """How many NUMA nodes are in use, in words."""
    count = len(host.nodes_in_use) or 1
    return f"{count} NUMA node{'s' if count > 1 else ''}"


def pool_places(host: Host, threads: int, pools: int) -> list[dict[str, Any]]:
    """Node, threads and CPUs of each pool, as kt_kernels' ThreadPool assigns them. A single pool runs on any CPU."""
    nodes = host.nodes_in_use
    bound = pools > 1 and len(nodes) > 1
    owners = [worker * pools // threads for worker in range(threads)]
    places = []
    for pool in range(pools):
        node = nodes[pool % len(nodes)] if bound else None
        cpus = node.cpus & host.affinity if node else host.affinity
        number = node.number if node else None
        places.append({"node": number, "threads": owners.count(pool), "cpus": show_cpu_list(cpus)})
    return places


def fewest_cores(host: Host) -> int:
    """Physical cores that this process may use on the NUMA node in use that has the fewest of them."""
    nodes = [node.cpus & host.affinity for node in host.nodes_in_use]
    return min((sum(1 for core in host.cores if core & cpus) for cpus in nodes), default=host.usable_cores)


def most_threads(host: Host) -> int:
    """More threads than this only compete with each other."""
    most = len(host.affinity) or 1
    return most if host.quota_cpus is None else min(most, max(1, math.ceil(host.quota_cpus)))
