"""What a user may write: every key, its type, its default and, in the docstring under it, its help.

Nothing here reads files or the machine, and null always means "resolve it": planning/ does that.
"""

from __future__ import annotations

import functools
import types
import typing
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from kt_model.methods import short_name

Layout = Literal["auto", "rank_major", "grouped_by_expert"]

LEAST_TOKENS = 64
"""Fewer would be too few for the proof."""


def _number_or_auto(given: Any) -> Any:
    """One error instead of one for each alternative."""
    if given is None or given == "auto" or (isinstance(given, int) and not isinstance(given, bool)):
        return given
    raise PydanticCustomError("number_or_auto", "Input should be a valid integer or auto")


def _positive_auto_or_off(given: Any) -> Any:
    """One error instead of one for each alternative; YAML reads off as false."""
    if given is None or given in ("auto", "off"):
        return given
    if given is False:
        return "off"
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return given
    raise PydanticCustomError("positive_auto_or_off", "Input should be an integer above 0, auto or off")


def _texts(value: Any) -> Any:
    """YAML and the command line turn 1 and true into numbers and booleans; a text key accepts them as text."""
    if isinstance(value, list):
        return [str(item).lower() if isinstance(item, bool) else str(item) for item in value]
    return value


class Section(BaseModel):
    """A part of the config: unknown keys are mistakes, and validated values are immutable."""

    # Built when first used: a section's own schema is needed only as part of the whole config's.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, defer_build=True)


class Model(Section):
    """The Mixture-of-Experts checkpoint to serve."""

    path: str | None = None
    """Folder of the Hugging Face checkpoint: config.json, tokenizer and safetensors files; model=/path/to/folder for
    short."""

    folder: str | None = None
    """Name of the checkpoint's folder under the models' root (paths.models); used when model.path is not given."""

    hub: str | None = None
    """Name of the checkpoint on the Hugging Face Hub, owner/name; model=owner/name for short."""

    revision: str | None = None
    """Branch, tag or commit on the Hub, as in model=owner/name@revision; main when not given."""

    name: str | None = None
    """Name of the model in requests; the checkpoint's folder name when not given."""

    trust_remote_code: bool = False
    """Allow the checkpoint's own Python code to run."""


class Adapter(Section):
    """One LoRA adapter in PEFT's format."""

    path: str | None = None
    """Folder of the adapter: adapter_config.json and adapter_model.safetensors."""

    folder: str | None = None
    """Name of the adapter's folder under the adapters' root (paths.loras); used when no path is given."""

    hub: str | None = None
    """Name of the adapter on the Hugging Face Hub, owner/name; lora=owner/name for short."""

    revision: str | None = None
    """Branch, tag or commit on the Hub; main when not given."""

    layout: Layout | None = None
    """Order of B's columns in this adapter's fused experts; that of lora.layout when not given."""


class Lora(Section):
    """The adapters served next to the base model, each reached as <model name>:<adapter name>."""

    adapters: dict[str, Adapter] = Field(default_factory=dict)
    """The adapters by name: presets and folders as lora=a, lora=/path/to/folder or lora=[a,/path/to/folder];
    "lora=[a,{name: c, path: /path/to/folder}]" names one."""

    path: str | None = None
    """Folder of one adapter; without lora.name it replaces the path of the chosen one."""

    name: str | None = None
    """Name of the adapter given by lora.path; its folder's name when not given."""

    layout: Layout = "auto"
    """Order of B's columns in fused experts: PEFT's, Unsloth's of before 17 September 2026, or what the files show."""

    allow_missing: bool = False
    """Accept an adapter that has no LoRA weights for some experts or projections of a layer; these stay as they are."""

    ignore: Annotated[list[str], BeforeValidator(_texts)] = Field(default_factory=list)
    """Parts of adapters to leave out, such as router, shared_experts, attention: lora.ignore=[router]."""

    max_rank: Annotated[int, Field(ge=1)] | None = None
    """Largest rank that the server accepts, also of adapters loaded later; that of the chosen adapters when not
    given."""

    max_per_batch: Annotated[int, Field(ge=1)] | None = None
    """How many adapters one batch may mix, including the base model; all of them when not given."""

    target_modules: Annotated[list[str], BeforeValidator(_texts)] = Field(default_factory=list)
    """Modules that adapters may change, by PEFT's names: lora.target_modules=[q_proj,gate_proj]; those of the chosen
    adapters when not given, and with lora=none all that the family supports."""

    allow: Annotated[list[str] | None, BeforeValidator(_texts)] = None
    """Folders from which adapters may be loaded while the server runs; those that the chosen adapters lie in when not
    given, and with lora=none the adapters' root."""

    @property
    def wants_capacity(self) -> bool:
        """Whether capacity is requested, which enables adapters that are loaded while the server runs."""
        return bool(self.max_rank or self.max_per_batch or self.target_modules or self.allow)


class Kt(Section):
    """The routed experts on the CPU."""

    method: Annotated[Literal["bf16", "int8", "int4"], BeforeValidator(short_name)] = "bf16"
    """Number format of the routed experts on the CPU; each runs on AMX, AVX-512 and AVX2. AMXBF16_SFT, AMXINT8_SFT and
    AMXINT4_SFT are accepted as aliases."""

    weight_path: str | None = None
    """Folder the routed experts are read from: the checkpoint for bf16, else what kt-launch quantize made."""

    prepare: bool = False
    """Make the folder of quantized experts first when it is missing."""

    packed_cache: Literal["auto", "off"] = "auto"
    """Keep the packed experts in the cache folder; the next start maps them instead of packing them again."""

    cpuinfer: int | None = None
    """Threads that compute experts; the usable physical cores when not given, less some with server.tp on GPUs."""

    threadpool_count: int | None = None
    """Thread pools, one for each NUMA node in use when not given."""

    tp_experts: Literal["auto", "split", "rank0"] = "auto"
    """With server.tp: split has each process compute its part of every expert on its share of the cores, rank0 the
    first process whole experts on the cores of all, to which the others add zeros; auto: split. On two GPUs rank0 was 4
    to 13 % faster at one request and level with split from 4 on. It leaves long prompts to the CPU, and needs two free
    cores for each process."""

    num_gpu_experts: Annotated[int | Literal["auto"] | None, BeforeValidator(_number_or_auto)] = None
    """Routed experts of each layer that stay on the GPU; auto: as many as fit. All are on the CPU when not given."""

    gpu_prefill_tokens: Annotated[int | Literal["auto", "off"] | None, BeforeValidator(_positive_auto_or_off)] = None
    """Prompts of so many tokens have their routed experts computed on the GPU, brought there piece by piece; auto: from
    where that is measured to be faster than the CPU, off: never. Each start proves that both give the same. auto when
    not given; off with server.dp, server.nodes and kt.tp_experts=rank0."""

    gpu_prefill_gib: Annotated[float, Field(gt=0)] | None = None
    """GPU memory for experts on their way there; up to about 1.5, as much as fits, when not given."""

    expert_profile: str | None = None
    """File that kt.record_experts wrote: the most used experts stay on the GPU, instead of the first ones."""

    record_experts: str | None = None
    """Count how often each expert is chosen, into this file; all experts then run on the CPU."""

    handover: Literal["auto", "host_function"] = "auto"
    """How a captured step gets from the GPU to the CPU: through a word of memory that both look at, or, slower,
    through host functions of the CUDA driver."""


class Server(Section):
    """The SGLang server."""

    host: str = "127.0.0.1"
    """Address to listen on; one that other machines can reach needs server.api_key or server.open=true."""

    api_key: str | None = None
    """Where to find the key that requests must carry: env:NAME or file:/path/to/file, never the key itself."""

    admin_key: str | None = None
    """Where to find the key for routes that change the server, such as loading adapters: env:NAME or
    file:/path/to/file."""

    open: bool = False
    """Serve other machines without a key."""

    origins: Annotated[list[str], BeforeValidator(_texts)] = Field(default_factory=list)
    """Origins of web pages whose scripts may send requests, such as https://chat.example.com; none when not given."""

    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port to listen on; 0 takes a free one."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where everything but the routed experts runs; auto takes a GPU when one can be used."""

    tp: Annotated[int, Field(ge=1)] = 1
    """Processes that split one copy of the model among them (tensor parallelism)."""

    dp: Annotated[int, Field(ge=1)] = 1
    """Copies of the model in one server (data parallelism), which share the requests out."""

    replicas: Annotated[int, Field(ge=1)] = 1
    """Servers of this plan on this host behind SGLang's router, each with its own cores and GPUs."""

    nodes: Annotated[int, Field(ge=1)] = 1
    """Hosts that serve one copy of the model together, each started with the same config and its own
    server.node_rank."""

    node_rank: Annotated[int, Field(ge=0)] | None = None
    """Number of this host among server.nodes; host 0 answers requests. Slurm and LeaderWorkerSet tell it when not
    given."""

    rendezvous: str | None = None
    """Where the processes of all hosts meet: host:port of host 0, with a port that is free there. Slurm and
    LeaderWorkerSet tell it when not given."""

    attention_backend: str | None = None
    """SGLang's attention backend; chosen for the device when not given."""

    sampling_backend: str | None = None
    """SGLang's sampling backend; chosen for the device when not given."""

    lora_backend: str | None = None
    """SGLang's LoRA backend; chosen for the device when not given."""

    cuda_graph: Literal["auto", "off"] = "auto"
    """CUDA graphs of decode steps; auto takes them on a GPU, and the proof compares replayed steps with eager ones."""

    context_length: Annotated[int, Field(ge=LEAST_TOKENS)] | None = None
    """Maximum length of prompt and answer together, in tokens."""

    max_total_tokens: Annotated[int, Field(ge=LEAST_TOKENS)] | None = None
    """Tokens the KV cache holds, over all requests."""

    chunked_prefill_size: Annotated[int, Field(ge=LEAST_TOKENS)] | None = None
    """Most tokens of prompts in one step: what one long prompt costs, and how long others wait for it."""

    max_running_requests: Annotated[int, Field(ge=1)] | None = None
    """Requests answered at the same time."""

    mem_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the device's memory for weights and KV cache."""

    fit: Literal["refuse", "warn"] = "refuse"
    """What happens when the launch will not fit in memory by the plan's estimate; warn starts it anyway."""

    start_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """How long the server may take until it answers."""

    hang_timeout_s: Annotated[float, Field(ge=0)] = 300.0
    """Time without a response after which a ready server counts as hung and is stopped; 0 for no limit."""

    restarts: Annotated[int, Field(ge=0)] | None = None
    """How often a server that was ready is restarted after a crash, with growing delays; when not given 3 for each of
    several replicas, whose others answer meanwhile, else 0."""

    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port for Prometheus metrics of CPU experts, run and SGLang; 0 takes a free one; no metrics when not given."""

    adapters_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port on which adapters are loaded into all servers behind a router at once, with server.replicas and
    kt-launch route; 0 takes a free one; none when not given."""

    playground_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port, on this machine only, for a page where base and adapters answer side by side; 0 takes a free one; no page
    when not given."""

    extra_args: Annotated[list[str], BeforeValidator(_texts)] = Field(default_factory=list)
    """More arguments for SGLang, as on its command line: server.extra_args=[--log-level,debug]."""


class Proof(Section):
    """Further checks before a server is called ready."""

    whole_model: Literal["auto", "off"] = "auto"
    """Compare its logprobs with transformers in float32, with and without adapters, where size and memory allow."""

    whole_model_gib: Annotated[float, Field(ge=0)] = 2.0
    """Largest checkpoint, in GiB of weights on disk, that is compared with transformers."""

    text: Literal["demand", "warn"] = "demand"
    """What happens when a shipped text is predicted no better than by chance, and there was no comparison with
    transformers."""


class Kept(Section):
    """What kt-launch config prints."""

    full: bool = False
    """All keys, and not only those that differ from the defaults."""

    resolved: bool = False
    """Freeze what was left open at this machine's values; versions and digests as comments."""


class Sizing(Section):
    """What kt-launch fit computes."""

    host: str | None = None
    """Whose rates are taken: this, for this machine, measured now; or amx, avx2, avx512 or xeon512 as they were
    measured. This machine where torch is installed, when not given."""

    shapes: Annotated[list[str], BeforeValidator(_texts)] = Field(default_factory=list)
    """Models that ship as shapes, such as deepseek-v3; all of them when neither these nor a model are given."""


class Merge(Section):
    """What kt-launch merge makes."""

    path: str | None = None
    """Folder for the merged checkpoint; it must not exist yet."""


class Cache(Section):
    """What kt-launch cache does with packed and quantized experts in the cache folder (KT_LAUNCH_CACHE)."""

    do: Literal["list", "verify", "prune"] = "list"
    """list shows sizes and states; verify reads everything again; prune removes broken and unfinished entries."""

    days: Annotated[float, Field(ge=0)] | None = None
    """With cache.do=prune: also packed experts that have not been used for this many days."""

    max_gib: Annotated[float, Field(ge=0)] | None = None
    """With cache.do=prune: also packed experts unused for the longest time, until the rest takes no more than this."""


class Hub(Section):
    """How models and adapters come from the Hugging Face Hub."""

    download: bool = False
    """Download what the Hub's cache lacks, after its size and whether it fits were checked."""


class Paths(Section):
    """Folders that presets and run folders are relative to."""

    models: str | None = None
    """The models' root; KT_LAUNCH_MODELS when not given."""

    loras: str | None = None
    """The adapters' root; KT_LAUNCH_LORAS, then the models' root, when not given."""

    runs: str | None = None
    """Where run folders go; KT_LAUNCH_RUNS, then the user's state folder, when not given."""


class Logs(Section):
    """What kt-launch logs shows."""

    lines: Annotated[int, Field(ge=0)] = 200
    """How many of the last lines to show."""

    follow: bool = False
    """Keep printing new lines until the run ends."""


class Chat(Section):
    """Which server kt-launch chat talks to, and how."""

    url: str | None = None
    """Address of a server, such as http://127.0.0.1:30000; by default a run that is ready, else a new one."""

    adapter: str | None = None
    """Adapter to begin with; the base model when not given."""

    system: str | None = None
    """System message that each conversation begins with."""

    max_tokens: Annotated[int, Field(ge=1)] | None = 1024
    """Maximum number of tokens in an answer; null leaves it to the server."""

    temperature: Annotated[float, Field(ge=0)] | None = None
    """Sampling temperature; the server's when not given."""


class Adapters(Section):
    """What kt-launch adapters changes, and where."""

    url: str | None = None
    """Address of a server, or of SGLang's router, such as http://127.0.0.1:30000; a run when not given."""

    load: dict[str, str] = Field(default_factory=dict)
    """Adapters to load, as adapters.load.west=/adapters/west: a name, and a folder on the servers' machines."""

    unload: Annotated[list[str], BeforeValidator(_texts)] = Field(default_factory=list)
    """Names of adapters to unload, before others are loaded: adapters.unload=[west]."""


class Replay(Section):
    """How kt-launch replay repeats a run."""

    start: bool = True
    """Start the server; false only reports what differs today."""

    strict: bool = False
    """Refuse to start when anything differs."""


class Export(Section):
    """What kt-launch export writes."""

    format: Literal["systemd", "docker", "compose", "kubernetes", "grafana"] = "systemd"
    """systemd unit, Dockerfile, compose file, Kubernetes manifest, or the Grafana dashboard of its metrics."""

    path: str | None = None
    """File to write; shown on stdout when not given."""


class Bench(Section):
    """What kt-launch bench measures."""

    concurrency: list[Annotated[int, Field(ge=1)]] = Field(default=[1, 2, 4], min_length=1)
    """Concurrent requests, one load after another: bench.concurrency=[1,4,16]."""

    requests: Annotated[int, Field(ge=1)] = 8
    """Requests of each load; never fewer than the concurrency."""

    input_tokens: Annotated[int, Field(ge=2)] = 128
    """Tokens of each prompt."""

    output_tokens: Annotated[int, Field(ge=2)] = 32
    """Tokens of each answer."""

    warmup: Annotated[int, Field(ge=0)] = 2
    """Requests sent before each load and not counted."""

    endpoint: Literal["auto", "chat", "completions"] = "auto"
    """The OpenAI endpoint that is measured; auto is chat where the tokenizer has a chat template."""

    quality: bool = True
    """Compare logprobs with a BF16 server's on a shipped text."""

    top_logprobs: Annotated[int, Field(ge=2)] = 256
    """How many of the most probable tokens are compared at each position."""

    references: str | None = None
    """Folder of the BF16 references; the cache (KT_LAUNCH_CACHE) when not given."""

    timeout_s: Annotated[float, Field(gt=0)] = 7200.0
    """How long one bench may take, from the start of its server to the end."""


class Sweep(Section):
    """How kt-launch -m runs several benches."""

    folder: str | None = None
    """Folder of the sweep; below the run folders when not given. Rows already in it are kept."""

    resume: bool = True
    """Continue the newest sweep of the same command if it was cut short, keeping its rows; false starts a new one."""

    retry: bool = False
    """When continuing, run failed rows again."""

    fail_fast: bool = False
    """Start no further job after one that failed."""

    objective: str = "output_tokens_per_s"
    """What an optimizing sweeper (sweep=optuna) gets from a row: a name of its summary, or a key of its plan."""


class Action(Section):
    """What kt-launch does."""

    name: str = "serve"
    """Name of the action, set by action=<name>."""


class Config(Section):
    """The whole config."""

    model: Model = Model()
    lora: Lora = Lora()
    kt: Kt = Kt()
    server: Server = Server()
    proof: Proof = Proof()
    config: Kept = Kept()
    fit: Sizing = Sizing()
    merge: Merge = Merge()
    cache: Cache = Cache()
    paths: Paths = Paths()
    hub: Hub = Hub()
    logs: Logs = Logs()
    chat: Chat = Chat()
    adapters: Adapters = Adapters()
    replay: Replay = Replay()
    export: Export = Export()
    bench: Bench = Bench()
    sweep: Sweep = Sweep()
    action: Action = Action()

    format: Literal["text", "json"] = "text"
    """What an action prints: text for people, or json for programs, alone on stdout; --json is the same."""

    detach: bool = False
    """Return when the server is ready and leave it running; kt-launch status, logs and stop find it."""

    run: str | None = None
    """The recorded run that replay, status, logs, chat, adapters and stop are about, by name or folder; the latest
    when not given."""

    workers: Annotated[list[str], BeforeValidator(_texts)] = Field(default_factory=list)
    """Addresses of the servers that kt-launch route puts behind one: workers=[http://host-a:30000,http://host-b:30000]."""

    key: str | None = None
    """The key that kt-launch explain explains; all when not given."""

    runs: Annotated[list[str], BeforeValidator(_texts)] = Field(default_factory=list)
    """The two runs that kt-launch diff compares, by folder or by name: runs=[a,b]."""


@functools.cache
def read_fields(section: type[Section] = Config, prefix: str = "") -> tuple[tuple[str, FieldInfo], ...]:
    """Every key a user may type, dotted, with its field; sections are walked, dictionaries are not."""
    found: list[tuple[str, FieldInfo]] = []
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found += read_fields(field.annotation, f"{key}.")
        else:
            found.append((key, field))
    return tuple(found)


def meaning_of(field: FieldInfo) -> str:
    """Its docstring on one line."""
    return " ".join((field.description or "").split())


def is_text(field: FieldInfo) -> bool:
    """Whether the key accepts free text, such as a path, which is used exactly as typed."""
    return str in _alternatives(field)


def is_text_list(field: FieldInfo) -> bool:
    """Whether the key accepts a list of free texts."""
    return field.annotation in (list[str], list[str] | None)


def is_list(key: str) -> bool:
    """Whether the key accepts a list."""
    found = (each for name, field in read_fields() if name == key for each in _alternatives(field))
    return any(typing.get_origin(each) is list for each in found)


def _alternatives(field: FieldInfo) -> tuple[Any, ...]:
    """The types that the key accepts."""
    return typing.get_args(field.annotation) if isinstance(field.annotation, types.UnionType) else (field.annotation,)


def values_of(field: FieldInfo) -> tuple[str, ...]:
    """What may be typed for the key where that can be listed: its words, or true and false."""
    if field.annotation is bool:
        return ("true", "false")
    return typing.get_args(field.annotation) if typing.get_origin(field.annotation) is Literal else ()


def is_open(field: FieldInfo) -> bool:
    """Whether the key holds a dictionary whose names the user chooses."""
    return typing.get_origin(field.annotation) is dict


def in_dictionary(key: str) -> bool:
    """Whether the user chooses the names below this key, as in lora.adapters.mine.path."""
    return any(is_open(field) and f"{key}.".startswith(f"{name}.") for name, field in read_fields())
