"""What a model takes of memory by its config.json alone, before its weights are here, for one method or for each."""

from __future__ import annotations

from kt_launch.config.schema import Config
from kt_launch.machine.host import Host
from kt_launch.planning.device import DEVICES
from kt_launch.planning.memory_fit import Demand, Fit, estimate
from kt_launch.planning.threads import usable_pools, usable_threads
from kt_model.checkpoint import Checkpoint

LIMITS = DEVICES["cpu"].limits


def size_up(base: Checkpoint, config: Config, host: Host, method: str | None = None) -> Fit:
    """The memory of a launch without adapters, with the limits that were typed or the usual ones of its device."""
    return estimate(demand_of(base, config, host, method), base, host)


def demand_of(base: Checkpoint, config: Config, host: Host, method: str | None = None) -> Demand:
    """What such a launch asks for."""
    server, on_gpu = config.server, bool(host.gpus) and host.cuda_torch and config.server.device != "cpu"
    threads = config.kt.cpuinfer or usable_threads(host)[0]
    context = server.context_length or min(int(LIMITS["context_length"] or 0), base.max_position or 4096)
    requests = server.max_running_requests or int(LIMITS["max_running_requests"] or 1)
    return Demand(
        method=method or config.kt.method,
        pools=config.kt.threadpool_count or usable_pools(host, threads),
        device="cuda" if on_gpu else "cpu",
        context_length=None if on_gpu and not server.context_length else context,
        max_running_requests=requests,
        max_total_tokens=server.max_total_tokens or (None if on_gpu else context * requests),
        mem_fraction=None,
        max_rank=0,
        max_per_batch=0,
        threads=threads,
    )
