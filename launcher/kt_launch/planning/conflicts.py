"""Which values of a plan conflict, or combine badly, as data: methods, pools, models, LoRA, SGLang's flags."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from kt_launch.machine.limits import Limits
from kt_model.flags import is_flag
from kt_model.methods import BF16, method_of
from kt_model.units import GIB


@dataclass(frozen=True)
class Situation:
    """The values of one plan that conflicts are checked on."""

    method: str
    threads: int
    pools: int
    nodes: int
    """NUMA nodes in use."""
    fewest_cores: int
    """Usable physical cores of the node that has the fewest."""
    hidden: int
    intermediate: int
    experts_bytes: int
    """Bytes of all routed experts, packed."""
    padding_percent: float
    """Share of them that is padding."""
    device: str
    attention_backend: str | None
    lora_backend: str
    instruction_set: str
    amx_refused: bool
    """Whether the CPU has AMX, but the kernel refuses it."""
    places_memory: bool
    disk: str
    adapters: int
    """Adapters named in the config."""
    lora: bool
    """Whether there are adapters, or capacity for later ones."""
    expert_lora: bool
    max_per_batch: int
    cores: int
    """Usable physical cores."""
    processes: int
    """Scheduler processes on this host."""
    computing: int
    """Those of them that compute experts."""
    stages: int
    """This and the next: as given in server.extra_args."""
    http_workers: int
    flags: frozenset[str]
    """Words of server.extra_args, without values."""
    limits: Limits
    max_running_requests: int

    def has(self, flag: str) -> bool:
        """Whether server.extra_args has this flag, or a prefix of it that belongs to no other row."""
        others = self.flags - {*REFUSED_FLAGS, *REFUSED_LORA_FLAGS}
        return flag in self.flags or any(is_flag(word, flag) for word in others)

    @property
    def threads_a_pool(self) -> int:
        """Of the largest pool."""
        return -(-self.threads // self.pools)

    @property
    def even_threads(self) -> int:
        """Expert threads of which each has a core on the node of its pool."""
        return self.pools * self.fewest_cores

    @property
    def threads_each(self) -> int:
        """Expert threads per process, so that each has a core."""
        return max(1, self.cores // self.computing)

    @property
    def least_files(self) -> int:
        """Open files of the process that has most: the scheduler's own, or one connection per request."""
        scheduler = SCHEDULER_FILES + (BESIDE_OTHERS if self.processes > 1 else 0)
        return max(scheduler, SERVER_FILES + (self.max_running_requests or 0))

    @property
    def least_threads(self) -> int:
        """Processes and threads of the whole server."""
        return SERVER_THREADS + self.processes * SCHEDULER_THREADS + self.computing * self.threads

    @property
    def least_addresses_gib(self) -> float:
        """Address space of the scheduler; a GPU's memory has addresses too, which are not counted here."""
        return LIBRARIES_GIB + self.experts_bytes * method_of(self.method).bits / BF16.bits / GIB

    @property
    def addresses_gib(self) -> float:
        """Address space that a process may have."""
        limit = self.limits.address_space_bytes
        return math.inf if limit is None else limit / GIB

    @property
    def slices(self) -> int:
        """Parts that an expert's inner width can be cut into, at least one per pool."""
        return -(-self.intermediate // 64)


@dataclass(frozen=True)
class Conflict:
    """Values that cannot be combined (refused), or combine badly (a warning). Texts are formatted with the
    situation."""

    key: str
    when: Callable[[Situation], bool]
    problem: str
    fix: str
    refused: bool = False


SCHEDULER_FILES, SERVER_FILES, SERVER_THREADS, SCHEDULER_THREADS = 88, 36, 20, 36
"""Measured on the demo's server with two threads: it starts with so many, and not with a tenth fewer."""
BESIDE_OTHERS = 42
"""Files that the first of several schedulers has open for the others."""
LIBRARIES_GIB = 2.0
"""Address space of a scheduler without a model; it does not start with 1.9, and the demo starts with 2.4."""
CPU_ATTENTION = ("torch_native", "intel_amx", "flex_attention")
CPU_LORA = ("torch_native",)


LEAVE_OUT = "Leave it out of server.extra_args."
SPREADS = "spreads experts over GPUs, but they run on the CPU"
BESIDE = "answers over gRPC, where neither keys nor adapters' names are checked"
ENCRYPTS = "encrypts the port over which the launcher proves and watches its server; a proxy in front of it can do that"
REFUSED_FLAGS: Mapping[str, str] = {
    "--kt-max-deferred-experts-per-token": "changes what is computed, and CPU experts here compute all of it",
    "--quantization": "chooses the format of experts on a GPU; that of CPU experts is kt.method",
    "--enable-two-batch-overlap": "runs two batches at once, but CPU experts handle the adapters of one batch only",
    "--enable-paged-experts": "keeps experts on a GPU page by page; how many stay there is kt.num_gpu_experts",
    **dict.fromkeys(
        ("--ep-size", "--expert-parallel-size", "--ep", "--moe-a2a-backend", "--enable-eplb", "--elastic-ep-backend"),
        SPREADS,
    ),
    "--is-embedding": "asks for a model that gives embeddings, and this one writes text",
    "--config": "reads further arguments from a file, which the plan does not see",
    "--enable-custom-logit-processor": "runs Python that requests bring along as pickles",
    "--uno-lora-path": "gives every request an adapter that is neither checked nor proven",
    **dict.fromkeys(("--grpc-port", "--grpc-mode", "--smg-grpc-mode"), BESIDE),
    **dict.fromkeys(("--ssl-certfile", "--ssl-keyfile"), ENCRYPTS),
    "--json-model-override-args": "changes what SGLang reads of config.json, but not what the plan, the experts' "
    "kernels and the proof read",
    "--decrypted-config-file": "has SGLang read another config.json than the plan, the experts' kernels and the proof",
    "--revision": "chooses among commits of a name on the Hub, but the server reads a folder",
    "--delete-ckpt-after-loading": "deletes the checkpoint, which a restart and the proof read",
    "--use-ray": "has Ray start the server's processes, which are then not watched",
}
"""SGLang's flags that cannot be combined with CPU experts, or with a server that is proven and watched, and why."""
FIXES: Mapping[str, str] = {
    "--json-model-override-args": "Change config.json instead, in a folder with links to the other files.",
    "--decrypted-config-file": "Put that file as config.json into a folder with links to the other files.",
    "--revision": "Set model.revision=<commit> instead.",
}
"""What to do instead of leaving the flag out."""
REFUSED_LORA_FLAGS: Mapping[str, str] = {
    "--experts-shared-outer-loras": "cuts the adapters' pools in a way that CPU experts do not read",
    "--lora-use-virtual-experts": "is for experts on a GPU; adapters on CPU experts are computed by kt_kernels",
}
"""The same for adapters on the experts."""


def _refused(flag: str, why: str, when: Callable[[Situation], bool] = lambda s: True) -> Conflict:
    return Conflict(
        "server.extra_args", lambda s: s.has(flag) and when(s), f"{flag} {why}", FIXES.get(flag, LEAVE_OUT), True
    )


CONFLICTS: tuple[Conflict, ...] = (
    # method x pools x model
    Conflict(
        "kt.threadpool_count",
        lambda s: s.pools > s.slices,
        "{s.pools} pools, but experts of inner width {s.intermediate} are cut into {s.slices} parts at most: the other "
        "pools hold nothing",
        "Set kt.threadpool_count={s.slices}.",
    ),
    Conflict(
        "kt.threadpool_count",
        lambda s: s.nodes < s.pools <= s.slices,
        "{s.pools} pools share {s.nodes} NUMA nodes",
        "One pool per node is usually faster.",
    ),
    Conflict(
        "kt.threadpool_count",
        lambda s: s.pools < s.nodes and s.pools < s.threads,
        "{s.pools} pools on {s.nodes} NUMA nodes: threads read weights across nodes",
        "Set kt.threadpool_count={s.nodes}, or leave it out.",
    ),
    Conflict(
        "kt.threadpool_count",
        lambda s: s.pools > 1 and not s.places_memory,
        "this container may not place memory on NUMA nodes, so pools read across them",
        "Start it with --cap-add SYS_NICE.",
    ),
    Conflict(
        "kt.cpuinfer",
        lambda s: 1 < s.pools <= s.threads and s.threads % s.pools > 0,
        "{s.threads} threads do not divide evenly among {s.pools} pools, and the larger ones wait for the smaller",
        "A multiple of {s.pools} is usually faster.",
    ),
    Conflict(
        "kt.cpuinfer",
        lambda s: 1 < s.pools == s.nodes and s.even_threads < s.threads <= s.cores,
        "{s.pools} pools of {s.threads_a_pool} threads, but one of the NUMA nodes has {s.fewest_cores} usable cores, "
        "and the others wait for it",
        "Set kt.cpuinfer={s.even_threads}, or let it use as many cores of each node (taskset, a container's cpuset).",
    ),
    Conflict(
        "kt.method",
        lambda s: s.padding_percent >= 10 and s.experts_bytes >= GIB,
        "{s.padding_percent:.0f} % of the packed experts is padding (hidden {s.hidden} and inner width "
        "{s.intermediate} go up to multiples of 64)",
        "",
    ),
    # method x CPU
    Conflict(
        "kt.method",
        lambda s: s.amx_refused,
        "the CPU has AMX, but the kernel refuses it; {s.instruction_set} is used",
        "Use Linux 5.16 or newer, and a container that lets arch_prctl through.",
    ),
    Conflict(
        "kt.method",
        lambda s: s.instruction_set == "reference",
        "this CPU has neither AVX2 nor more, so experts run in plain C++, tens of times slower",
        "Use a CPU with AVX2.",
    ),
    # device x backends
    Conflict(
        "server.attention_backend",
        lambda s: s.device == "cpu" and s.attention_backend not in CPU_ATTENTION,
        "{s.attention_backend} needs a GPU, but server.device is cpu",
        "Set server.attention_backend=torch_native, or leave it out.",
        refused=True,
    ),
    Conflict(
        "server.lora_backend",
        lambda s: s.device == "cpu" and s.lora and s.lora_backend not in CPU_LORA,
        "{s.lora_backend} needs a GPU, but server.device is cpu",
        "Set server.lora_backend=torch_native, or leave it out.",
        refused=True,
    ),
    Conflict(
        "model.path",
        lambda s: s.disk in ("network", "spinning"),
        "the checkpoint is on a {s.disk} disk, so the first start is slow",
        "Copy it to a local solid-state disk.",
    ),
    # LoRA x flags
    Conflict(
        "lora.max_per_batch",
        lambda s: s.adapters > 0 and s.max_per_batch <= s.adapters,
        "{s.max_per_batch} of {s.adapters} adapters and the base model fit in one batch, so requests take turns",
        "",
    ),
    Conflict(
        "server.extra_args",
        lambda s: s.adapters == 0 and s.has("--lora-paths"),
        "adapters given to SGLang by --lora-paths are neither checked nor proven",
        "Set lora.path=/path/to/folder.",
        refused=True,
    ),
    Conflict(
        "server.extra_args",
        lambda s: s.lora and s.has("--speculative-algorithm"),
        "--speculative-algorithm drafts with the bare model, whose guesses an adapter rejects",
        "Measure it with kt-launch bench before you keep it.",
    ),
    # CPU experts x flags
    *(_refused(flag, why) for flag, why in REFUSED_FLAGS.items()),
    *(_refused(flag, why, lambda s: s.expert_lora) for flag, why in REFUSED_LORA_FLAGS.items()),
    # limits of a shell or a container
    Conflict(
        "server.max_running_requests",
        lambda s: s.limits.open_files is not None and s.limits.open_files < s.least_files,
        "a process may have {s.limits.open_files} files open, and the server needs {s.least_files}",
        "Run ulimit -n 65536 before starting (LimitNOFILE= in a systemd unit).",
        refused=True,
    ),
    Conflict(
        "kt.cpuinfer",
        lambda s: s.limits.threads_left is not None and s.limits.threads_left < s.least_threads,
        "{s.limits.threads_left} more processes and threads may be started, and the server needs {s.least_threads}",
        "Raise ulimit -u (TasksMax= in a systemd unit, --pids-limit in Docker), or end other processes.",
        refused=True,
    ),
    Conflict(
        "server.fit",
        lambda s: s.addresses_gib < s.least_addresses_gib,
        "a process may have {s.addresses_gib:.1f} GiB of addresses (ulimit -v, ulimit -d), and the server needs "
        "{s.least_addresses_gib:.1f} GiB",
        "Run ulimit -v unlimited before starting; limit memory by a cgroup.",
        refused=True,
    ),
    # processes
    Conflict(
        "kt.cpuinfer",
        lambda s: s.computing > 1 and s.threads > s.threads_each,
        "{s.computing} scheduler processes start {s.threads} expert threads each, on {s.cores} cores",
        "Set kt.cpuinfer={s.threads_each}.",
    ),
    Conflict(
        "server.extra_args",
        lambda s: s.stages > 1,
        "pipeline parallelism splits the layers among processes, of which only the first can be proven",
        "Leave --pp-size out of server.extra_args.",
        refused=True,
    ),
    Conflict(
        "server.extra_args",
        lambda s: s.http_workers > 1,
        "with --tokenizer-worker-num {s.http_workers} processes answer requests, and an adapter that one of them "
        "loads or unloads is unknown to the others",
        LEAVE_OUT,
        refused=True,
    ),
)


def conflicts(situation: Situation) -> Iterator[tuple[Conflict, str, str]]:
    """The rows that apply, each with its problem and its fix in words."""
    for conflict in CONFLICTS:
        if conflict.when(situation):
            yield conflict, conflict.problem.format(s=situation), conflict.fix.format(s=situation)
