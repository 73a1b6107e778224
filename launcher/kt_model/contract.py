"""What crosses from the launcher to the server's processes besides the plan, and back.

To them: environment variables of the plan. From them: `kt_launch` under `internal_states` of SGLang's `/server_info`,
one Report a scheduler process; and lines in its log that tell how far a start is.
"""

from __future__ import annotations

import re
from typing import TypedDict

LORA_OPTIONS = "KT_LAUNCH_LORA_OPTIONS"
"""lora.ignore, lora.allow_missing, lora.layout and lora.allow as JSON, for adapters that a running server loads;
layouts: what was typed for single ones, by path without links."""
PROFILE = "KT_LAUNCH_PROFILE"
"""Set where somebody looks at where the experts' time goes."""
PROCESS_CPUS = "KT_LAUNCH_PROCESS_CPUS"
"""CPUs of each scheduler process of this host in the order of their devices, as 0-7|8-15; not set for a single one."""
SGLANG_CPUS = "SGLANG_CPU_OMP_THREADS_BIND"
"""The same for SGLang, which on a CPU would else want a NUMA node for each."""
ROUTING = "KT_LAUNCH_ROUTING"
"""Arguments of the router's process, as JSON."""
PACKED_CACHE = "KT_LAUNCH_PACKED_CACHE"
"""`off`: neither mapped nor written."""
ORIGINS = "KT_LAUNCH_ORIGINS"
"""JSON: origins of web pages whose scripts may ask."""
START = "KT_LAUNCH_START"
"""A number of its own for each start of a server. All that it makes in shared memory bears it in its name."""
START_HEADER = "x-kt-launch-start"
"""Each HTTP answer carries it, so that the launcher knows that it hears the server that it started."""

RUN_FOLDER = "KT_LAUNCH_RUN_FOLDER"
"""The folder of the run, where a launcher watches the server."""
READY_FILE = "ready.json"
"""In that folder for as long as the server is proven; written by the launcher."""
ADAPTERS_FILE = "adapters.json"
"""In that folder once an adapter was loaded or unloaded while the server ran: path by name, of all that requests can
name; written by the server, for its next start."""
STATE_FILE, READY = "state.json", "ready"
"""In that folder: JSON, whose `state` is READY while the server is proven and its schedulers answer."""
PROVEN_ROUTE = "/health_proven"
"""Answers 200 while that state is READY, else 503; 404 without a launcher. Needs no key, as all that begins like it."""

EXPERT_PROFILE = "KT_LAUNCH_EXPERT_PROFILE"
"""The file that says which experts are resident; the first ones where it is not set."""
RECORD_EXPERTS = "KT_LAUNCH_RECORD_EXPERTS"
"""The file to write such a profile to."""
GPU_PREFILL = "KT_LAUNCH_GPU_PREFILL"
"""JSON, where experts may come to the GPU for long prompts: `tokens` from which on (None: measured), `bytes` of the
buffers (None: as usual)."""
HANDOVER = "KT_LAUNCH_HANDOVER"
"""How captured steps reach the CPU, where it is not to be chosen there: HOST_FUNCTION."""
HOST_FUNCTION = "host_function"
TP_EXPERTS, RANK0 = "KT_LAUNCH_TP_EXPERTS", "rank0"
"""Set to that where the first rank of tensor parallelism has all CPU experts, whole; else each rank has its part."""
LAUNCHER = "KT_LAUNCH_LAUNCHER"
"""Number of the process that watches the server, which ends with it: nobody would prove or restart it any more."""

OWN_ADMIN_KEY = "KT_LAUNCH_OWN_ADMIN_KEY"
"""Where requests need a key and the user has none for routes that change the server: one that the launcher made up."""

OUTPUTS_RECEIVED = "kt_launch_outputs_received"
"""The key in `/server_info`: messages that came back from the detokenizer, of all that the schedulers sent it
(Report.outputs_sent). None where it is not counted."""
REPORT = "kt_launch"
"""The key of a Report in a scheduler's internal state."""
BASE = "base"
"""Stands for the base where adapters go by SGLang's id."""
NO_ADAPTER = -1
"""Stands for the base where adapters go by their slot."""
PROGRESS = re.compile(
    r"kt-launch progress: (?P<phase>\w+) (?P<done>\d+)(?: of (?P<total>\d+))? (?P<unit>\w+)(?: (?P<what>\S+))?$"
)
"""A line of the server's log: how far a phase of the start is, and what it is at."""


def progress_line(phase: str, done: int, total: int, unit: str, what: str = "") -> str:
    """In the form of PROGRESS; total 0: nobody knows."""
    of = f" of {total}" if total else ""
    return f"kt-launch progress: {phase} {done}{of} {unit} {what}".rstrip()


class LayerReport(TypedDict):
    """One MoE layer of one process. Counts are those since the start; bytes of packed weights."""

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
    replayed_ns: int
    """Time of the kernels inside of replayed steps."""
    recent: list[tuple[int, int, int]] | None
    """Where phases are counted: start and end of the last replayed calls in nanoseconds since the epoch, and rows."""
    adapter_slots: int
    phases: dict[str, dict[str, int]] | None
    lora_layer: str | None
    reference_error: dict[str, float | None]
    """By slot, as text: relative L2 error of one token recomputed in float32; None where nothing could be compared."""


class PackedCacheReport(TypedDict):
    """state: off, none (not there, or its name not known yet), unsound, mapped, written, not written."""

    state: str
    entry: str | None
    problem: str | None


class GpuPrefillReport(TypedDict):
    """Long prompts, whose experts come to the GPU. state: off, proving (nothing has been compared yet), on."""

    state: str
    why: str
    tokens: int | None
    """Of a batch, from which on; None where the CPU is faster at all sizes that were measured."""
    measured: list[tuple[int, float, float]]
    """Tokens, and milliseconds of a layer in kt_kernels and on the GPU."""
    link_gb_s: float
    errors: dict[str, float]
    """By BASE or SGLang's id of an adapter: largest relative L2 difference of a layer from kt_kernels."""
    buffer_bytes: int
    tokens_ran: int
    """That went through in each layer."""
    adapter_tokens_ran: int
    bytes: int
    """Of packed experts that were brought."""


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
    """Reports of the further ranks of tensor parallelism, on all hosts; only in that of rank 0, which alone answers."""


def computes_nothing(report: Report) -> bool:
    """Whether the CPU experts of this process are those of another rank (TP_EXPERTS)."""
    return bool(report["layers"]) and not any(layer["experts"] for layer in report["layers"])
