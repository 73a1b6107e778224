"""The scheduler processes: how many there are, on how many hosts, and this host's resources for each. If a model cannot
be split among them, SGLang would fail in a bare assertion after all processes are up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kt_launch.planning.draft import Draft
from kt_model.cpulist import show_cpu_list
from kt_model.flags import flags_in, is_flag
from kt_model.installed import ROUTER, requirement
from kt_model.methods import method_of

if TYPE_CHECKING:
    from kt_launch.config.schema import Config
    from kt_launch.machine.host import Host

KEYS: Mapping[str, str] = {
    "--tp-size": "server.tp",
    "--tensor-parallel-size": "server.tp",
    "--dp-size": "server.dp",
    "--data-parallel-size": "server.dp",
    "--nnodes": "server.nodes",
    "--node-rank": "server.node_rank",
    "--dist-init-addr": "server.rendezvous",
    "--nccl-init-addr": "server.rendezvous",
}
"""SGLang's flags that the plan sets by these keys."""
STAGES = ("--pp-size", "--pipeline-parallel-size")
HTTP_WORKERS = ("--tokenizer-worker-num",)
OWN_HEADS = "--enable-dp-attention"
"""With this flag the ranks split requests, not heads."""
EXPERTS_KEY = "kt.tp_experts"
ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):\d{1,5}")


@dataclass(frozen=True)
class Ranks:
    """The scheduler processes of a launch. tensor: those that split one copy of the model; copies: copies of the
    model."""

    tensor: int
    copies: int
    hosts: int
    replicas: int
    """Servers on this host, each with all of these processes."""
    first_has_experts: bool = False
    """Whether the first of those that split a copy computes its routed experts for all of them."""

    @property
    def here(self) -> int:
        """Processes on this host."""
        return max(1, self.tensor * self.copies // self.hosts) * self.replicas

    @property
    def computing(self) -> int:
        """Those of them that compute routed experts."""
        return max(1, self.here // self.tensor) if self.first_has_experts else self.here

    @property
    def expert_parts(self) -> int:
        """Parts that every routed expert is cut into."""
        return 1 if self.first_has_experts else self.tensor


def ranks_of(config: Config) -> Ranks:
    """As configured; with data-parallel attention, the ranks hold one copy of everything else."""
    server, first = config.server, config.kt.tp_experts == "rank0" and config.server.tp > 1
    copies = 1 if OWN_HEADS in server.extra_args else server.dp
    return Ranks(server.tp, copies, server.nodes, server.replicas, first)


def process_shares(host: Host, ranks: Ranks) -> tuple[Host, ...]:
    """This host's resources for each process. One that computes the experts of others has their cores too, on which
    they only start kernels."""
    own, computing = host.shares(ranks.here), host.shares(ranks.computing)
    each = ranks.here // ranks.computing
    return tuple(share if number % each else computing[number // each] for number, share in enumerate(own))


def share_of(host: Host, config: Config) -> Host:
    """This host's resources for the process with experts that gets the least; all of these have as many threads."""
    return min(host.shares(ranks_of(config).computing), key=lambda share: share.usable_cores)


def resolve_ranks(draft: Draft) -> None:
    """Called before threads and memory are divided."""
    _refuse_flags(draft)
    _resolve_hosts(draft)
    ranks = ranks_of(draft.config)
    for key in ("server.tp", "server.dp", "server.replicas", "server.nodes"):
        if draft.given(key) > 1:
            draft.keep(key)
    if ranks.tensor * ranks.copies * ranks.replicas > 1:
        shares = [show_cpu_list(share.affinity) for share in process_shares(draft.facts.host, ranks)]
        draft.set("server.processes", shares, "derived: server.tp, server.dp, server.nodes; CPUs of each process here")
    if ranks.tensor > 1:
        _resolve_experts(draft, ranks)
    _check_replicas(draft)
    _check_gpus(draft, ranks)
    _check_split(draft, ranks)


def _refuse_flags(draft: Draft) -> None:
    for flag, value in flags_in(draft.config.server.extra_args):
        meant = next((key for known, key in KEYS.items() if is_flag(flag, known)), None)
        if meant:
            problem = f"{flag} must be set with {meant}, which threads, memory and proof are planned by"
            draft.problems.add("server.extra_args", problem, f"Set {meant}={value or '<value>'} instead.")


def _resolve_hosts(draft: Draft) -> None:
    server, place = draft.config.server, draft.facts.place
    if server.nodes == 1:
        if server.node_rank:
            problem = f"{server.node_rank}, but there is one host"
            draft.problems.add("server.node_rank", problem, "Set server.nodes to the number of hosts.")
        return
    number = draft.keep_or("server.node_rank", place.number, place.source)
    meeting = draft.keep_or("server.rendezvous", place.meeting, place.source)
    if number is None or number >= server.nodes:
        problem = f"{'not given' if number is None else number}, but hosts are numbered from 0 to {server.nodes - 1}"
        draft.problems.add("server.node_rank", problem, "Set server.node_rank to the number of this host.")
    if meeting is None or not ADDRESS.fullmatch(meeting):
        problem = f"{meeting or 'not given'}, but {server.nodes} hosts need an address to meet at"
        draft.problems.add("server.rendezvous", problem, "Set server.rendezvous=<host 0>:<free port>, the same on all.")
    if server.tp % server.nodes:
        problem = f"{server.tp} processes cannot be shared out evenly to {server.nodes} hosts"
        draft.problems.add("server.tp", problem, f"Set server.tp={server.nodes}, or a multiple of it.")
    if server.dp > 1 and OWN_HEADS not in server.extra_args:
        problem = f"{server.dp} copies of the model, but SGLang puts them on one host"
        draft.problems.add("server.dp", problem, "Start one server a host instead, or set server.dp=1.")


def _resolve_experts(draft: Draft, ranks: Ranks) -> None:
    """Which process computes the routed experts of all."""
    if draft.config.kt.tp_experts == "auto":
        draft.set(EXPERTS_KEY, "split", "default: as fast as rank0 from 4 requests on, and long prompts use all GPUs")
        return
    draft.keep(EXPERTS_KEY)
    if ranks.first_has_experts and ranks.hosts > 1:
        problem = f"rank0, but the processes of {ranks.hosts} hosts have no cores in common"
        draft.problems.add(EXPERTS_KEY, problem, f"Set {EXPERTS_KEY}=split, or leave it out.")
    if ranks.first_has_experts and OWN_HEADS in draft.config.server.extra_args:
        problem = f"rank0, but with {OWN_HEADS} each process has requests of its own"
        draft.problems.add(EXPERTS_KEY, problem, f"Set {EXPERTS_KEY}=split, or leave it out.")


def _check_replicas(draft: Draft) -> None:
    server = draft.config.server
    if server.replicas == 1:
        if server.adapters_port is not None:
            problem = "one server loads adapters on its own port"
            draft.problems.add("server.adapters_port", problem, "Leave it out, or set server.replicas=2.")
        return
    if server.nodes > 1:
        problem = f"{server.replicas} replicas, but they are servers of one host"
        draft.problems.add("server.replicas", problem, "Set server.nodes=1, or server.replicas=1.")
    if not draft.facts.router:
        problem = f"several servers need SGLang's router, the package {ROUTER}, which is not installed"
        draft.problems.add("server.replicas", problem, f"Type: pip install {requirement(ROUTER)}")
    if draft.value("server.device") == "cuda":
        devices = [gpu.index for gpu in draft.facts.host.gpus]
        draft.set("server.devices", devices, "probed: GPUs, shared out to the replicas in this order")


def _check_gpus(draft: Draft, ranks: Ranks) -> None:
    count = len(draft.facts.host.gpus)
    if draft.value("server.device") == "cuda" and ranks.here > count:
        key = "server.tp" if ranks.tensor > 1 else "server.dp"
        problem = f"{ranks.here} processes need as many GPUs, but {count} can be used"
        draft.problems.add(key, problem, "Use fewer, or set server.device=cpu.")


def _check_split(draft: Draft, ranks: Ranks) -> None:
    base = draft.facts.checkpoint
    if base is None or ranks.tensor < 2:
        return
    numbers = dict(base.shared_out)
    if OWN_HEADS in draft.config.server.extra_args:
        numbers.pop("num_attention_heads", None)
    odd = {key: number for key, number in numbers.items() if number % ranks.tensor}
    width, group = base.moe_intermediate_size, method_of(draft.config.kt.method).group or 1
    if odd:
        shares = ", ".join(f"{key} {number}" for key, number in odd.items())
        problem = f"{ranks.tensor} processes cannot split what config.json has: {shares}"
        draft.problems.add("server.tp", problem, _fix(ranks.tensor, numbers))
    elif width % (ranks.expert_parts * group) and ranks.expert_parts > 1:
        groups = f"groups of {group} ({draft.config.kt.method})"
        problem = f"{ranks.tensor} processes cannot split experts of inner width {width} in {groups}"
        draft.problems.add("server.tp", problem, f"Set kt.method=int8, {EXPERTS_KEY}=rank0 or another server.tp.")


def _fix(ranks: int, numbers: Mapping[str, int]) -> str:
    fewer = next(count for count in range(ranks - 1, 0, -1) if not any(number % count for number in numbers.values()))
    return f"Set server.tp={fewer}." if fewer > 1 else "Leave server.tp out."
