"""How much memory a model needs, and how fast one request can be, from its config.json alone, before its weights are
downloaded. Computed from shapes and measured rates (rates.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kt_launch.config.schema import Config
from kt_launch.gathering.rates import Rates
from kt_launch.machine.host import Host
from kt_launch.planning.device import DEVICES
from kt_launch.planning.memory_fit import (
    BF16_BYTES,
    CUDA_CONTEXT,
    Demand,
    Fit,
    activation_bytes,
    estimate,
    host_parts,
    kv_bytes,
    rest_bytes,
    shard_bytes,
)
from kt_launch.planning.ranks import ranks_of
from kt_launch.planning.threads import usable_pools, usable_threads
from kt_model.checkpoint import Checkpoint
from kt_model.methods import METHODS

LIMITS = DEVICES["cpu"].limits


def size_up(base: Checkpoint, config: Config, host: Host, method: str | None = None) -> Fit:
    """The memory of a launch without adapters, with the limits that were typed or the device's defaults."""
    return estimate(demand_of(base, config, host, method), base, host)


def demand_of(base: Checkpoint, config: Config, host: Host, method: str | None = None) -> Demand:
    """What such a launch needs."""
    server, on_gpu = config.server, bool(host.gpus) and host.cuda_torch and config.server.device != "cpu"
    threads, ranks = config.kt.cpuinfer or usable_threads(host)[0], ranks_of(config)
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
        tensor=ranks.tensor,
        copies=ranks.copies,
        processes=ranks.here,
        first_has_experts=ranks.first_has_experts,
    )


@dataclass(frozen=True)
class Size:
    """What one model needs with one method, in bytes, and an upper bound on the tokens per second of one request."""

    model: str
    method: str
    experts_bytes: int
    host_bytes: int
    """Host memory without a GPU."""
    host_bytes_beside_gpu: int
    gpu_bytes: int
    """Memory of a GPU that holds everything but the routed experts."""
    tokens_per_s: float
    tokens_per_s_beside_gpu: float
    """Considering the experts alone: the GPU's work takes a little longer."""


def sizes_of(name: str, base: Checkpoint, config: Config, host: Host, rates: Rates) -> list[Size]:
    """One for each method."""
    return [_size(name, base, config, host, rates, method) for method in METHODS]


def _size(name: str, base: Checkpoint, config: Config, host: Host, rates: Rates, method: str) -> Size:
    without = replace(demand_of(base, config, host, method), device="cpu")
    tokens = (without.context_length or 0) * (without.max_running_requests or 1)
    without = replace(without, max_total_tokens=without.max_total_tokens or tokens)
    beside = replace(without, device="cuda")
    hosts = max(config.server.nodes, 1)
    experts_s = active_expert_bytes(base, method) / rates.of(method, base) / hosts
    rest_s = active_rest_bytes(base) / rates.read / hosts
    return Size(
        model=name,
        method=method,
        experts_bytes=sum(shard_bytes(method, base, 1)),
        host_bytes=sum(host_parts(without, base).values()),
        host_bytes_beside_gpu=sum(host_parts(beside, base).values()),
        gpu_bytes=CUDA_CONTEXT + rest_bytes(base) + kv_bytes(beside, base) + activation_bytes(beside, base),
        tokens_per_s=1 / (experts_s + rest_s),
        tokens_per_s_beside_gpu=1 / experts_s,
    )


def active_expert_bytes(base: Checkpoint, method: str) -> float:
    """Bytes of routed experts read per token."""
    return sum(shard_bytes(method, base, 1)) * base.top_k / base.num_experts


def active_rest_bytes(base: Checkpoint) -> int:
    """Bytes of everything else read per token: all but the embedding, of which one row is read."""
    embedding = 0 if base.tied else base.vocab_size * base.hidden_size * BF16_BYTES
    return rest_bytes(base) - base.latent_projection_bytes - embedding
