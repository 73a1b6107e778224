"""What crosses from the launcher to the server's processes besides the plan, and back.

To them: environment variables of the plan. From them: `kt_launch` under `internal_states` of SGLang's `/server_info`,
one Report per scheduler process; and log lines that report the progress of a start.
"""

from __future__ import annotations

import re
from typing import TypedDict

LORA_OPTIONS = "KT_LAUNCH_LORA_OPTIONS"
"""lora.ignore, lora.allow_missing, lora.layout and lora.allow as JSON, for adapters loaded by a running server;
layouts: typed ones of single adapters, by resolved path."""
PROFILE = "KT_LAUNCH_PROFILE"
"""Set if the time spent in experts is to be measured."""
PROCESS_CPUS = "KT_LAUNCH_PROCESS_CPUS"
"""CPUs of each scheduler process of this host in device order, as 0-7|8-15; not set for a single process."""
SGLANG_CPUS = "SGLANG_CPU_OMP_THREADS_BIND"
"""The same for SGLang, which on a CPU would otherwise require a NUMA node for each."""
ROUTING = "KT_LAUNCH_ROUTING"
"""Arguments of the router's process, as JSON."""
PACKED_CACHE = "KT_LAUNCH_PACKED_CACHE"
"""`off`: neither read nor written."""
ORIGINS = "KT_LAUNCH_ORIGINS"
"""JSON: origins of web pages whose scripts may send requests."""
START = "KT_LAUNCH_START"
"""A unique number for each start of a server; the names of all its shared memory contain it."""
START_HEADER = "x-kt-launch-start"
"""A header of every HTTP answer, so that the launcher knows that it talks to the server that it started."""
NO_TEMPLATE = "no chat template"
"""Words in the error of a chat with a model that has none."""

RUN_FOLDER = "KT_LAUNCH_RUN_FOLDER"
"""The run's folder, if a launcher watches the server."""
READY_FILE = "ready.json"
"""A file in that folder as long as the server is proven; written by the launcher."""
ADAPTERS_FILE = "adapters.json"
"""A file in that folder once an adapter was loaded or unloaded at run time: path by name, for all that requests can
name. Written by the server, for its next start."""
STATE_FILE, READY = "state.json", "ready"
"""A file in that folder: JSON, whose `state` is READY while the server is proven and its schedulers answer."""
PROVEN_ROUTE = "/health_proven"
"""Answers 200 while that state is READY, else 503; 404 without a launcher. Paths with this prefix need no key."""

EXPERT_PROFILE = "KT_LAUNCH_EXPERT_PROFILE"
"""The profile that selects the resident experts; the first ones if not set."""
RECORD_EXPERTS = "KT_LAUNCH_RECORD_EXPERTS"
"""The file to write such a profile to."""
GPU_PREFILL = "KT_LAUNCH_GPU_PREFILL"
"""JSON, if experts may be streamed to the GPU for long prompts: `tokens` from which on (None: measured), `bytes` of the
buffers (None: default)."""
HANDOVER = "KT_LAUNCH_HANDOVER"
"""How captured steps reach the CPU, if forced: HOST_FUNCTION."""
HOST_FUNCTION = "host_function"
TP_EXPERTS, RANK0 = "KT_LAUNCH_TP_EXPERTS", "rank0"
"""Set to RANK0 if the first tensor-parallel rank has all CPU experts, whole; otherwise each rank has its part."""
PLAN_VARIABLES = frozenset(
    (
        *(LORA_OPTIONS, PROFILE, PROCESS_CPUS, SGLANG_CPUS, PACKED_CACHE, ORIGINS),
        *(EXPERT_PROFILE, RECORD_EXPERTS, GPU_PREFILL, HANDOVER, TP_EXPERTS),
    )
)
"""Those of the variables above that a plan may set."""
LAUNCHER = "KT_LAUNCH_LAUNCHER"
"""Pid of the process that watches the server. The server ends with it, because nobody could prove or restart it any
more."""

OWN_ADMIN_KEY = "KT_LAUNCH_OWN_ADMIN_KEY"
"""A key that the launcher made up, if requests need a key and the user has none for routes that change the server."""

OUTPUTS_RECEIVED = "kt_launch_outputs_received"
"""The key in `/server_info`: how many of the messages that schedulers sent to the detokenizer (Report.outputs_sent)
have come back. None if they are not counted."""
REPORT = "kt_launch"
"""The key of a Report in a scheduler's internal state."""
BASE = "base"
"""Stands for the base where adapters are listed by SGLang's id."""
NO_ADAPTER = -1
"""Stands for the base where adapters are listed by slot."""
PROGRESS = re.compile(
    r"kt-launch progress: (?P<phase>\w+) (?P<done>\d+)(?: of (?P<total>\d+))? (?P<unit>\w+)(?: (?P<what>\S+))?$"
)
"""A log line: the progress of a start's phase, and what it is doing."""


def progress_line(phase: str, done: int, total: int, unit: str, what: str = "") -> str:
    """In the form of PROGRESS; total 0: unknown."""
    of = f" of {total}" if total else ""
    return f"kt-launch progress: {phase} {done}{of} {unit} {what}".rstrip()


class LayerReport(TypedDict):
    """One MoE layer of one process. Counts are since the start; bytes are those of packed weights."""

    layer: int
    isa: str
    method: str
    experts: int
    packed_bytes: int
    mapped: bool
    batches: int
    tokens: int
    adapter_tokens: int
    passed: int
    """Batches to which this rank added nothing of CPU experts, which are the first rank's; then all else is 0."""
    replayed: int
    replayed_adapter_tokens: int
    replayed_experts: int
    """The experts whose weights each replayed step read, added up."""
    replayed_ns: int
    """Time of the kernels in replayed steps."""
    eager_ns: int
    """Time of the kernels in all other steps."""
    recent: list[tuple[int, int, int]] | None
    """If phases are measured: start and end of the last replayed calls in nanoseconds since the epoch, and rows."""
    adapter_slots: int
    phases: dict[str, dict[str, int]] | None
    lora_layer: str | None
    reference_error: dict[str, float | None]
    """By slot, as text: relative L2 error of one token recomputed in float32; None if nothing could be compared."""


class PackedCacheReport(TypedDict):
    """state: off, none (no entry, or its name is not known yet), unsound, mapped, written, not written."""

    state: str
    entry: str | None
    problem: str | None


class GpuPrefillReport(TypedDict):
    """Long prompts whose experts are streamed to the GPU. state: off, proving (nothing has been compared yet), on."""

    state: str
    why: str
    tokens: int | None
    """Batch size in tokens from which on it is used; None if the CPU was faster at all measured sizes."""
    measured: list[tuple[int, float, float]]
    """Tokens, and milliseconds of a layer in kt_kernels and on the GPU."""
    between_ms: float
    """From one layer's experts to the next one's, in batches of few tokens; added to the time in kt_kernels."""
    link_gb_s: float
    errors: dict[str, float]
    """By BASE or SGLang's id of an adapter: largest relative L2 difference of a layer from kt_kernels."""
    buffer_bytes: int
    tokens_ran: int
    """Tokens computed this way in each layer."""
    adapter_tokens_ran: int
    bytes: int
    """Bytes of packed experts that were copied."""


class Report(TypedDict):
    """One scheduler process."""

    pid: int
    cpus: list[int]
    """Logical CPUs that it may run on."""
    packed_cache: PackedCacheReport
    outputs_sent: int
    """Messages to the detokenizer."""
    unread_tensors: int
    missing_hooks: list[str]
    slots: dict[str, str]
    """Slot → SGLang's id of the adapter in it."""
    checked_adapters: dict[str, float | None]
    """SGLang's id of a loaded adapter whose rows went through kt_kernels → its relative L2 error."""
    gpu_prefill: GpuPrefillReport | None
    layers: list[LayerReport]
    others: list[Report]
    """Reports of the other tensor-parallel ranks, on all hosts; only in rank 0's report, since only rank 0 answers."""


def computes_nothing(report: Report) -> bool:
    """Whether another rank computes the CPU experts of this process (TP_EXPERTS)."""
    return bool(report["layers"]) and not any(layer["experts"] for layer in report["layers"])
