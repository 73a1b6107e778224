"""Whether a launch fits the machine: which parts need memory and where, and what is free there. Pure: host.py has read
the machine, checks.py decides what to do if it does not fit, nearest_fits.py finds the settings that would.

The kernels report the sizes of packed experts, packed adapters and scratch; the rest follows SGLang's pools. MEASURED
has the few numbers that no formula gives. kt_kernels is imported only when needed, so that completion does not wait for
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kt_model.families import value_width
from kt_model.methods import BF16, method_of
from kt_model.plan import HOST_MEMORY
from kt_model.prefill_buffers import MOST_FACTOR_BYTES, Buffers, buffers
from kt_model.tensors.header import BITS
from kt_model.units import GIB, MIB, gib

if TYPE_CHECKING:
    from kt_launch.machine.host import Gpu, Host
    from kt_model.checkpoint import Checkpoint

BF16_BYTES = 2
PREFILL_TOKENS: Mapping[str, int] = {"cpu": 4096, "cuda": 8192}
"""SGLang's chunked_prefill_size: the most tokens processed at once."""

MEASURED: Mapping[str, int] = {"cpu": 1480 * MIB, "cuda": 2944 * MIB}
"""Host memory of SGLang's processes (HTTP, scheduler, detokenizer) before any model is loaded."""
SCHEDULER: Mapping[str, int] = {"cpu": 700 * MIB, "cuda": 2 * GIB}
"""Host memory of each further scheduler process before any model is loaded."""
CONTROLLER = 600 * MIB
"""The process that distributes requests among the copies of a model."""
CUDA_CONTEXT = 800 * MIB
"""GPU memory of CUDA and its libraries."""
NCCL = 800 * MIB
"""GPU memory of NCCL's buffers in each process of several that split a model."""
GATHERED = 256 * MIB
"""MOST_GATHERED_BYTES of plugins/kt_sglang/experts/resident_adapters.py."""
LEAST_KV_TOKENS = 2048
"""On a GPU, where SGLang uses all that is left for the KV cache, a server with fewer tokens than this is useless."""
CAPTURE_TOKENS = ((20, 2048), (60, 4096), (160, 8192), (None, 16384))
"""SGLang's chunked_prefill_size on GPUs of less than so many GiB."""
ROOMY = 60 * GIB
KV_SPLITS, MOST_KV_SPLITS, SPLIT_TOKENS = 8, 256, 32
"""Into how many parts Triton attention splits a captured request's cache; with MLA up to a part for each
multiprocessor, their number rounded up to a power of 2, and at least SPLIT_TOKENS tokens each."""

SHARE = "SGLang's share of it"
EXPERTS, ADAPTERS, REST, KV, ACTIVATIONS, BASE, COMING = (
    "routed experts", "adapters", "rest of the model", "KV cache", "activations", "SGLang itself",
    "experts for long prompts",
)  # fmt: skip
FRACTIONS = (0.9, 0.95)
"""Values of server.mem_fraction above the default."""


@dataclass(frozen=True)
class Demand:
    """What needs memory in a plan. None: SGLang chooses."""

    method: str
    pools: int
    device: str
    context_length: int | None
    max_running_requests: int | None
    max_total_tokens: int | None
    mem_fraction: float | None
    max_rank: int
    max_per_batch: int
    threads: int = 1
    """Kernel threads in each process."""
    tensor: int = 1
    """Processes that split one copy of the model."""
    copies: int = 1
    """Copies of the model, in processes of their own."""
    servers: int = 1
    """Replicas, each with its own HTTP process."""
    processes: int = 1
    """All scheduler processes of this host."""
    first_has_experts: bool = False
    """Whether the first of those that split a copy has its routed experts, whole; else each has a part of them."""
    expert_ranks: tuple[int, ...] = ()
    """Ranks of the adapters that reach routed experts."""
    other_pairs: int = 0
    """Low-rank pairs of all adapters outside the routed experts."""
    resident: int = 0
    """Resident routed experts of each layer."""
    streamed: bool = False
    """Whether experts are streamed to the device for long prompts."""
    streamed_bytes: int | None = None
    """Upper bound for the streaming buffers."""
    prefill_tokens: int | None = None
    """Tokens in one step."""
    captured: int = 0
    """Requests in the largest captured decode step; 0 without CUDA graphs."""
    triton_attention: bool = False
    total_is_derived: bool = False
    """Whether max_total_tokens follows context_length and max_running_requests."""

    @property
    def computing(self) -> int:
        """Processes of this host that have routed experts in host memory."""
        return max(1, self.processes // self.tensor) if self.first_has_experts else self.processes


@dataclass(frozen=True)
class MemoryBudget:
    """One kind of memory: what is free, and how much each part needs."""

    name: str
    free_bytes: int
    parts: Mapping[str, int]
    advice: str = ""
    """Set if exceeding this budget only costs speed: what happens then."""

    @property
    def needed_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.free_bytes

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {gib(size)}" for name, size in self.parts.items() if size >= GIB // 100)
        return f"{self.name}: {gib(self.needed_bytes)} GiB are needed ({parts}), {gib(self.free_bytes)} GiB are free"


@dataclass(frozen=True)
class Fit:
    """All budgets of one launch."""

    budgets: tuple[MemoryBudget, ...]

    @property
    def short(self) -> tuple[MemoryBudget, ...]:
        """Exceeded budgets that make the launch fail."""
        return tuple(budget for budget in self.budgets if not budget.fits and not budget.advice)

    @property
    def slow(self) -> tuple[MemoryBudget, ...]:
        """Exceeded budgets that spill into others."""
        return tuple(budget for budget in self.budgets if not budget.fits and budget.advice)

    @property
    def needs(self) -> dict[str, dict[str, int]]:
        return {budget.name: dict(budget.parts) for budget in self.budgets}

    @property
    def free(self) -> dict[str, int]:
        return {budget.name: budget.free_bytes for budget in self.budgets}


def estimate(demand: Demand, base: Checkpoint, host: Host) -> Fit:
    """The budgets, those of the whole machine first."""
    if not host.free_bytes:
        return Fit(())
    on_gpu = demand.device == "cuda"
    budgets = [MemoryBudget(HOST_MEMORY, host.free_bytes, host_parts(demand, base))]
    if demand.pools > 1 or demand.processes > 1:
        budgets += _nodes(demand, base, host)
    if on_gpu:
        budgets += _gpu(demand, base, host)
    elif demand.mem_fraction is not None:
        budgets.append(_share(demand, base, host))
    return Fit(tuple(budgets))


def host_parts(demand: Demand, base: Checkpoint) -> dict[str, int]:
    on_cpu, experts = demand.device == "cpu", _experts_of_one(demand, base)
    computing = {
        EXPERTS: sum(_shards(demand, experts)),
        ADAPTERS: packed_adapter_bytes(demand, experts) + expert_slot_bytes(demand, experts),
        ACTIVATIONS: scratch_bytes(demand, experts),
    }
    others = {ADAPTERS: kept_adapter_bytes(demand, base) + expert_slot_bytes(demand, _part(demand, base))}
    each = {
        REST: rest_bytes(base) // demand.tensor,
        ADAPTERS: other_slot_bytes(demand, base) // demand.tensor,
        KV: _kv_part(demand, base),
        ACTIVATIONS: activation_bytes(demand, base),
    }
    further = (demand.processes - demand.servers) * SCHEDULER[demand.device]
    further += demand.servers * (CONTROLLER if demand.copies > 1 else 0)
    return {BASE: demand.servers * MEASURED[demand.device] + further} | {
        name: demand.computing * computing.get(name, 0)
        + (demand.processes - demand.computing) * others.get(name, 0)
        + (demand.processes * each.get(name, 0) if on_cpu else 0)
        for name in (EXPERTS, REST, ADAPTERS, KV, ACTIVATIONS)
    }


def _part(demand: Demand, base: Checkpoint) -> Checkpoint:
    """The model with experts as wide as each process has them on its device."""
    return replace(base, moe_intermediate_size=base.moe_intermediate_size // demand.tensor)


def _experts_of_one(demand: Demand, base: Checkpoint) -> Checkpoint:
    """The model with experts as wide as a process that computes them in host memory has them."""
    return base if demand.first_has_experts else _part(demand, base)


def _kv_part(demand: Demand, base: Checkpoint) -> int:
    """The cache of one process: for its own heads, but with MLA's whole latent vector."""
    return kv_bytes(demand, base) // (1 if base.family.latent_cache else demand.tensor)


def _nodes(demand: Demand, base: Checkpoint, host: Host) -> Iterator[MemoryBudget]:
    """Experts on the nodes of their pools; the kernel prefers these nodes and spills to others when they are full."""
    nodes = host.nodes_in_use
    if len(nodes) < 2 or not host.places_memory:
        return
    taken = dict.fromkeys((node.number for node in nodes), 0)
    for share in host.shares(demand.computing):
        for shard, size in enumerate(_shards(demand, _experts_of_one(demand, base))):
            taken[share.nodes_in_use[shard % len(share.nodes_in_use)].number] += size
    for node in nodes:
        if taken[node.number]:
            advice = "the rest is placed on other nodes, which are slower to read"
            yield MemoryBudget(f"NUMA node {node.number}", node.free_bytes, {EXPERTS: taken[node.number]}, advice)


def _gpu(demand: Demand, base: Checkpoint, host: Host) -> Iterator[MemoryBudget]:
    for gpu in host.gpus[: demand.processes]:
        yield from _one_gpu(demand, base, gpu)


def _one_gpu(demand: Demand, base: Checkpoint, gpu: Gpu) -> Iterator[MemoryBudget]:
    libraries = CUDA_CONTEXT + (NCCL if demand.tensor > 1 else 0)
    share = int((demand.mem_fraction or default_fraction(demand, gpu)) * (gpu.free_bytes - libraries))
    static = {
        EXPERTS: resident_bytes(demand, _part(demand, base)),
        REST: rest_bytes(base) // demand.tensor,
        ADAPTERS: other_slot_bytes(demand, base) // demand.tensor + resident_slot_bytes(demand, _part(demand, base)),
        KV: _kv_part(demand, base),
        COMING: coming_bytes(demand, base),
    }
    taken = {**static, KV: static[KV] if demand.max_total_tokens else _cache_of_the_rest(static, share)}
    activations = activation_bytes(demand, base) + graph_bytes(demand, base)
    parts = {BASE: libraries, **taken, ACTIVATIONS: activations}
    yield MemoryBudget(gpu.memory, gpu.free_bytes, parts)
    yield MemoryBudget(f"SGLang's share of {gpu.memory}", share, static)


def default_fraction(demand: Demand, gpu: Gpu) -> float:
    """SGLang's mem_fraction_static where nothing is given: it keeps memory for the activations of a prefill, for
    captured graphs, and for each process (handle_gpu_memory_settings in arg_groups/memory_hook.py)."""
    usual = next(tokens for size, tokens in CAPTURE_TOKENS if size is None or gpu.memory_bytes < size * GIB)
    tokens = max(demand.prefill_tokens or usual, 2048)
    kept = 512 * MIB + tokens * 3 * MIB // 2 + demand.tensor * 128 * MIB + _most_captured(demand) * 2 * MIB
    kept = max(kept, 10 * GIB) if gpu.memory_bytes > ROOMY else kept
    return round(max(1 - kept / max(gpu.memory_bytes, 1), 0), 3)


def _most_captured(demand: Demand) -> int:
    return min(demand.captured, demand.max_running_requests or demand.captured)


def graph_bytes(demand: Demand, base: Checkpoint) -> int:
    """What Triton attention allocates for captured steps: the partial results of every head and part of the cache, in
    float32, and the cache's indices (init_cuda_graph_state in layers/attention/triton_backend.py)."""
    if not demand.triton_attention or not (requests := _most_captured(demand)):
        return 0
    context = demand.context_length or base.max_position or 0
    heads = base.shared_out.get("num_attention_heads", 1) // demand.tensor
    splits, width = KV_SPLITS, value_width(base.family, base.config)
    if base.family.latent_cache:
        splits = min(max(KV_SPLITS, _power_of_2(-(-context // SPLIT_TOKENS))), MOST_KV_SPLITS)
    return requests * (heads * splits * width * 4 + context * 8)


def _power_of_2(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def _cache_of_the_rest(static: Mapping[str, int], share: int) -> int:
    """SGLang uses all that its share leaves for the KV cache, however little would be enough."""
    return max(static[KV], share - sum(static.values()) + static[KV])


def _share(demand: Demand, base: Checkpoint, host: Host) -> MemoryBudget:
    """On a CPU, SGLang reserves 1 - mem_fraction of the memory that was free before the weights, and counts each node's
    part of the rest for the KV cache alone; what remains of it after the weights bounds the cache."""
    parts = host_parts(demand, base)
    static = {EXPERTS: parts[EXPERTS], REST: parts[REST], ADAPTERS: demand.processes * slot_bytes(demand, base)}
    static[KV] = parts[KV] * max(len(host.nodes), 1)
    free = int((demand.mem_fraction or 1) * max(host.free_bytes - parts[BASE], 0))
    return MemoryBudget(SHARE, free, static)


def shard_bytes(method: str, base: Checkpoint, pools: int, experts: int | None = None) -> list[int]:
    """Bytes of all layers' routed experts in each pool's memory. experts: number per layer; all if not given."""
    import kt_kernels

    count, layers = base.num_experts if experts is None else experts, len(base.moe_layers)
    if count < 1 or pools < 1:  # refused elsewhere, by the key that was typed
        return [0] * pools
    sizes = kt_kernels.packed_bytes(
        method=method_of(method).sglang_name,
        num_experts=count,
        hidden_size=base.hidden_size,
        intermediate_size=base.moe_intermediate_size,
        nodes=pools,
    )
    return [layers * size for size in sizes]


def _shards(demand: Demand, base: Checkpoint) -> list[int]:
    return shard_bytes(demand.method, base, demand.pools, base.num_experts - demand.resident)


def resident_bytes(demand: Demand, base: Checkpoint) -> int:
    """Resident experts as SGLang stores them: bfloat16, unpadded."""
    one = 3 * base.hidden_size * base.moe_intermediate_size * BF16_BYTES
    return one * demand.resident * len(base.moe_layers)


def resident_slot_bytes(demand: Demand, base: Checkpoint) -> int:
    """The factors of resident experts for every slot (plugins/kt_sglang/experts/resident_adapters.py)."""
    if not demand.max_rank or not demand.expert_ranks:
        return 0
    values = 3 * _padded(demand.max_rank, 8) * (base.hidden_size + base.moe_intermediate_size)
    return demand.max_per_batch * values * demand.resident * len(base.moe_layers) * BF16_BYTES


def coming_buffers(demand: Demand, base: Checkpoint) -> Buffers | None:
    """The streaming buffers of one process; None if no experts are streamed, or not even two fit into the typed
    size."""
    base = _part(demand, base)
    hidden, inner = base.hidden_size, _padded(base.moe_intermediate_size, 64)
    unpacked = (2 * _padded(hidden, 64) + _padded(hidden, 16)) * inner * BF16_BYTES
    packed = sum(shard_bytes(demand.method, replace(base, moe_layers=(0,)), demand.pools, 1)) if demand.streamed else 0
    if not packed:
        return None
    return buffers(packed, unpacked, max(base.num_experts - demand.resident, 1), demand.streamed_bytes)


def _padded(size: int, step: int) -> int:
    return -(-size // step) * step


def coming_bytes(demand: Demand, base: Checkpoint) -> int:
    """The buffers, and factors of a batch's adapters: of a layer and the next as copied, some as multiplied."""
    found = coming_buffers(demand, base)
    if found is None:
        return 0
    if not demand.expert_ranks:
        return found.bytes
    factors = demand.max_per_batch * _adapter_values(_part(demand, base), demand.max_rank, 1) * BF16_BYTES
    return found.bytes + 2 * factors + MOST_FACTOR_BYTES


def most_residents(demand: Demand, base: Checkpoint, host: Host, step: int) -> int:
    """The largest multiple of `step`, below all experts, that fits and leaves the KV cache half of the memory next to
    the rest of the model."""
    for count in range((base.num_experts - 1) // step * step, 0, -step):
        wanted = replace(demand, resident=count)
        if not estimate(wanted, base, host).short and _leaves_half(wanted, base, host):
            return count
    return 0


def _leaves_half(demand: Demand, base: Checkpoint, host: Host) -> bool:
    parts = next(place.parts for place in _gpu(demand, base, host))
    taken = parts[EXPERTS] + resident_slot_bytes(demand, base)
    return bool(demand.max_total_tokens) or taken <= parts[KV]


def packed_adapter_bytes(demand: Demand, base: Checkpoint) -> int:
    """Our copies of the adapters in the slots, and the tensors that SGLang keeps of every adapter."""
    ranks = sorted(demand.expert_ranks, reverse=True)[: demand.max_per_batch]
    return kept_adapter_bytes(demand, base) + sum(_packed_adapter(base, rank) for rank in ranks)


def kept_adapter_bytes(demand: Demand, base: Checkpoint) -> int:
    """The tensors that SGLang keeps of every adapter on routed experts."""
    return sum(_adapter_values(base, rank, len(base.moe_layers)) * BF16_BYTES for rank in demand.expert_ranks)


def _packed_adapter(base: Checkpoint, rank: int) -> int:
    """One adapter in all layers."""
    import kt_kernels

    one = kt_kernels.packed_adapter_bytes(
        num_experts=base.num_experts,
        hidden_size=base.hidden_size,
        intermediate_size=base.moe_intermediate_size,
        ranks=_ranks(rank),
    )
    return one * len(base.moe_layers)


def _ranks(rank: int) -> tuple[int, int, int]:
    """Of gate, up and down; bounded by the kernels' counters, which no memory could hold either."""
    return (min(rank, 1 << 30),) * 3


def slot_bytes(demand: Demand, base: Checkpoint) -> int:
    """SGLang's pools: each slot has space for the largest rank in every layer, including dense ones."""
    return expert_slot_bytes(demand, base) + other_slot_bytes(demand, base)


def expert_slot_bytes(demand: Demand, base: Checkpoint) -> int:
    """The pools of routed experts, which are in host memory on every device."""
    if not demand.max_rank or not demand.expert_ranks:
        return 0
    return demand.max_per_batch * _adapter_values(base, demand.max_rank, base.num_layers) * BF16_BYTES


def other_slot_bytes(demand: Demand, base: Checkpoint) -> int:
    """The pools of everything else, which are on the model's device."""
    return demand.max_per_batch * demand.other_pairs * demand.max_rank * 4 * base.hidden_size * BF16_BYTES


def _adapter_values(base: Checkpoint, rank: int, layers: int) -> int:
    return 3 * rank * (base.hidden_size + base.moe_intermediate_size) * base.num_experts * layers


def rest_bytes(base: Checkpoint) -> int:
    """Everything but routed experts, in bfloat16; MLA's kv_b_proj twice, because SGLang also keeps it transposed."""
    return (base.other_bytes + base.latent_projection_bytes) * BITS["BF16"] // BITS[base.expert_dtype]


def kv_bytes(demand: Demand, base: Checkpoint) -> int:
    """The cache of all tokens, and the table that maps requests to them."""
    tokens = demand.max_total_tokens or max(demand.context_length or 0, LEAST_KV_TOKENS)
    requests, context = demand.max_running_requests or 1, demand.context_length or base.max_position
    return tokens * base.num_layers * base.kv_values * BF16_BYTES + (requests + 1) * context * 4


def scratch_bytes(demand: Demand, base: Checkpoint) -> int:
    """Scratch that the kernels' pool keeps for a prefill, with adapters up to the largest rank."""
    import kt_kernels

    rank = demand.max_rank if demand.expert_ranks else 0
    return kt_kernels.scratch_bytes(
        method=method_of(demand.method).sglang_name,
        num_experts=max(base.num_experts - demand.resident, 1),
        hidden_size=base.hidden_size,
        intermediate_size=base.moe_intermediate_size,
        tokens=_prefill_tokens(demand),
        top_k=base.top_k,
        threads=max(demand.threads, 1),
        nodes=max(demand.pools, 1),
        ranks=_ranks(rank),
    )


def activation_bytes(demand: Demand, base: Checkpoint) -> int:
    """Hidden states of a prefill with their copies through a layer, and the logits of all requests."""
    hidden_states = _prefill_tokens(demand) * base.hidden_size * BF16_BYTES * 12 + _resident_activations(demand, base)
    hidden_states += _coming_activations(demand, base)
    return hidden_states + 3 * (demand.max_running_requests or 16) * base.vocab_size * 4


def _resident_activations(demand: Demand, base: Checkpoint) -> int:
    """The intermediate between the two products of resident experts, and gathered adapter factors or grouped rows."""
    if not demand.resident:
        return 0
    row = (3 * base.moe_intermediate_size + base.hidden_size) * BF16_BYTES
    choices = _prefill_tokens(demand) * base.top_k
    factors = 2 * demand.max_rank * (base.hidden_size + base.moe_intermediate_size) * BF16_BYTES
    gathered = 2 * min(GATHERED, choices * factors) if demand.expert_ranks else 0
    return choices * row + gathered


def _coming_activations(demand: Demand, base: Checkpoint) -> int:
    """The outputs of all choices, and the intermediate of a piece chosen by twice as many tokens as average."""
    found = coming_buffers(demand, base)
    if found is None:
        return 0
    rows = _prefill_tokens(demand) * base.top_k
    out, pieces = rows * base.hidden_size * BF16_BYTES, -(-base.num_experts // found.experts)
    between = rows * (base.hidden_size + 5 * _part(demand, base).moe_intermediate_size) * BF16_BYTES
    return out + between * 2 // pieces


def _prefill_tokens(demand: Demand) -> int:
    most = demand.prefill_tokens or PREFILL_TOKENS[demand.device]
    return min(most, demand.max_total_tokens or most)


def padding_percent(base: Checkpoint) -> float:
    """Share of the packed experts that is padding."""
    import kt_kernels

    hidden, inner = base.hidden_size, base.moe_intermediate_size
    (packed,) = kt_kernels.packed_bytes(
        method=BF16.sglang_name, num_experts=1, hidden_size=hidden, intermediate_size=inner
    )
    return 100 * (1 - 3 * inner * hidden * BF16_BYTES / packed)
