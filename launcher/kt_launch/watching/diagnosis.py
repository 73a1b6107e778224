"""Why a server died: signatures of known crashes as data; for unknown ones, the exception that caused it.

A new signature is a row of SIGNATURES with a log snippet that shows it. `python -m kt_launch.watching.diagnosis` prints
docs/troubleshooting.md. Reads no files: the caller passes the log and the kernel's counters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from kt_model.errors import ServerDidNotStart

DOCS = "docs/troubleshooting.md"
LONGEST_LINE = 240


@dataclass(frozen=True)
class Signature:
    """One known crash. configuration: the same start would fail the same way, so it is never retried. starting: that
    applies to a start only; a server that had been ready is restarted."""

    title: str
    pattern: str
    cause: str
    key: str
    fix: str
    example: str
    configuration: bool = True
    starting: bool = False

    @property
    def name(self) -> str:
        """Its anchor in the docs."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


NOT_FOR_MEMORY = "(the kernel counts no kill for lack of memory)"
NO_ROOM = "(no room is left on the disk of"
"""What is added to the evidence of a kill where that is known; after NO_ROOM, the folder."""
KILL, BUS = re.compile(r"exit code:? -9\b|SIGKILL"), re.compile(r"exit code:? -7\b|SIGBUS")
MEMORY_KILLED = Signature(
    "Out of memory, ended by the kernel",
    r"Out of memory: Killed process|oom_kill counted",
    "the machine or its cgroup ran out of memory, and the kernel killed a process of the server",
    "server.max_total_tokens",
    "Give it more memory, or reduce what it holds: a smaller server.max_total_tokens or server.context_length, fewer "
    "adapters (lora.max_per_batch), or kt.method=int8.",
    "kernel: Out of memory: Killed process 10703 (sglang::schedul) total-vm:412880168kB, anon-rss:128112340kB",
    configuration=False,
)

# Searched in this order: the ones that say most about their cause come first.
CAUSES = (
    MEMORY_KILLED,
    Signature(
        "Host memory cannot be pinned",
        r"kt_sglang: \d+ bytes of host memory cannot be pinned",
        "CUDA got no host memory that stays where it is, through which the CPU's experts and the GPU talk: a limit "
        "(ulimit -l, the container's) or the machine's free memory is too small",
        "server.cuda_graph",
        "Raise the limit (ulimit -l unlimited; a container: --ulimit memlock=-1), or free host memory.",
        "RuntimeError: kt_sglang: 1048576 bytes of host memory cannot be pinned: CUDA error: out of memory",
    ),
    Signature(
        "Out of GPU memory",
        r"CUDA out of memory|torch\.OutOfMemoryError|CUDA error: out of memory|cudaErrorMemoryAllocation",
        "the GPU has less free memory than the server asked for",
        "server.mem_fraction",
        "Lower server.mem_fraction or server.max_total_tokens, or free the GPU (nvidia-smi shows who uses it).",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 "
        "GiB of which 1.19 GiB is free.",
        starting=True,
    ),
    Signature(
        "No memory left for the KV cache",
        r"Not enough memory\. Please try (?:to increase|increasing) --mem-fraction-static|"
        r"mem_fraction_static.*too small|Loaded weights leave no GPU memory for the KV cache",
        "the weights fill the share of memory that SGLang was given, and nothing is left for the KV cache",
        "server.mem_fraction",
        "Raise server.mem_fraction, or serve fewer or smaller adapters.",
        "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.",
        starting=True,
    ),
    Signature(
        "The machine refused memory",
        r"DefaultCPUAllocator: can't allocate memory|std::bad_alloc|^MemoryError|Cannot allocate memory",
        "an allocation on the host failed: there is not that much memory, or a limit (ulimit -v, cgroup) forbids it",
        "server.max_total_tokens",
        "Lower server.max_total_tokens or server.context_length, or lift the limit.",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 137438953472 bytes. Error code 12 (Cannot allocate memory)",
        starting=True,
    ),
    Signature(
        "Port in use",
        r"address already in use|Address already in use|EADDRINUSE",
        "another process listens on a port of the server",
        "server.port",
        "Set server.port=0 for a free port, or stop the other process.",
        "ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 30000): address already in use",
        starting=True,
    ),
    Signature(
        "SGLang cannot be imported",
        r"kt_sglang: SGLang cannot be imported",
        "a package that SGLang imports is missing, or does not fit the others",
        "server",
        "Install it: pip install kt-launch[cpu] brings what SGLang needs on a CPU, pip install kt-launch[gpu] what it "
        "needs on a GPU.",
        "kt_sglang: SGLang cannot be imported: ModuleNotFoundError: No module named 'opentelemetry'. Install what is "
        "missing.",
    ),
    Signature(
        "A hook into SGLang does not match",
        r"kt_sglang: SGLang did not take these hooks|Failed to (?:apply|load) (?:hook|plugin).*kt_sglang|"
        r"(?:AttributeError|ImportError|ModuleNotFoundError): .*(?:kt_ep_wrapper|FusedMoEWithLoRA|hook_registry)",
        "the installed SGLang differs from the version that the plugin knows, so one of its hooks is not in place",
        "server",
        "Run kt-launch doctor: it names the hook, and the SGLang version to install.",
        "kt_sglang: SGLang did not take these hooks: sglang.srt.lora.layers.FusedMoEWithLoRA. This SGLang differs from "
        "the one kt-launch knows",
    ),
    Signature(
        "Missing shard",
        r"(?:FileNotFoundError|No such file or directory).*\.safetensors|Cannot find any model weights with",
        "a weights file that the checkpoint's index names is not in its folder",
        "model.path",
        "Download the missing file again.",
        'FileNotFoundError: No such file or directory: "/models/x/model-00002-of-000004.safetensors"',
    ),
    Signature(
        "Header too large",
        r"[Hh]eader ?[Tt]oo ?[Ll]arge|[Hh]eader ?[Tt]oo ?[Ss]mall|InvalidHeader|invalid header deserialization",
        "a file named .safetensors is not one: usually a torch pickle with the wrong name, or an incomplete download",
        "lora.path",
        "Convert it with safetensors, or move it out of the checkpoint's folder: SGLang reads every "
        ".safetensors there.",
        "safetensors_rust.SafetensorError: Error while deserializing header: header too large",
    ),
    Signature(
        "Truncated weights file",
        r"incomplete metadata, file not fully covered|MetadataIncompleteBuffer",
        "a safetensors file is shorter than its header says: the download or the copy was cut short",
        "model.path",
        "Get the file again.",
        "safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata, file not "
        "fully covered",
    ),
    Signature(
        "A pickle instead of safetensors",
        r"UnpicklingError|Weights only load failed|invalid load key",
        "weights are stored as a Python pickle, which could run any code and is not read",
        "model.path",
        "Use the safetensors form of the checkpoint or adapter.",
        "_pickle.UnpicklingError: Weights only load failed. In PyTorch 2.6, we changed the default value",
    ),
    Signature(
        "Number of GPU experts is None",
        r"empty\(\) received an invalid combination of arguments - got \(NoneType|num_gpu_experts.*NoneType",
        "the server was started without --kt-num-gpu-experts, and SGLang used None as a size",
        "kt.num_gpu_experts",
        "Start it with kt-launch, which sets it (0: all routed experts on the CPU).",
        "TypeError: empty() received an invalid combination of arguments - got (NoneType, int, int, dtype=torch.dtype)",
    ),
    Signature(
        "Number of CPU threads is None",
        r"unsupported operand type\(s\) for //: 'NoneType' and 'int'|cpuinfer.*NoneType",
        "the server was started without --kt-cpuinfer, and the kernel divided None by the number of pools",
        "kt.cpuinfer",
        "Start it with kt-launch, which sets it to the usable physical cores.",
        "TypeError: unsupported operand type(s) for //: 'NoneType' and 'int'",
    ),
    Signature(
        "Base weights not set",
        r"[Bb]ase weights not set|experts? .* (?:was|were) not loaded",
        "experts ran before their weights had been read from the folder of this method",
        "kt.weight_path",
        "Choose the folder that this kt.method reads from: the checkpoint for bf16, quantized weights for the others.",
        "RuntimeError: Base weights not set",
    ),
    Signature(
        "No close on a safetensors file",
        r"safe_open'? object has no attribute '?close",
        "code called close() on a safetensors file, which its reader does not have",
        "model.trust_remote_code",
        "Not the launcher's own code: look for it in the checkpoint's code or an extension.",
        "AttributeError: 'builtins.safe_open' object has no attribute 'close'",
    ),
    Signature(
        "Experts failed in a replayed step",
        r"kt_kernels failed in a replayed step",
        "kt_kernels could not compute a step that a CUDA graph replayed; the line says in which layer and why",
        "server.cuda_graph",
        "Set server.cuda_graph=off for steps without graphs, and report it with the run folder.",
        "RuntimeError: layer 3: kt_kernels failed in a replayed step: adapter_slots[0]: slot 4 is empty",
        configuration=False,
    ),
    Signature(
        "Tensors on two devices",
        r"Expected all tensors to be on the same device|found at least two devices",
        "a tensor stayed on the CPU where the GPU expected it, as happens when CPU experts run inside a CUDA graph",
        "server.cuda_graph",
        "Set server.cuda_graph=off, and take --cuda-graph-* out of server.extra_args.",
        "RuntimeError: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
    ),
    Signature(
        "The kernel computes something else",
        r"recomputed in float32, is off by",
        "a token recomputed in float32 differs from what the experts gave: gibberish would be served",
        "kt.method",
        "kt-launch doctor tests each kernel on this machine; report what it finds.",
        "proof: layer 1: one token of the base, recomputed in float32, is off by 0.93 (relative L2), expected "
        "at most 0.02",
    ),
    Signature(
        "The server computes another model",
        r"the server does not compute the model of",
        "logprobs at random prompts are not those of the checkpoint (with the adapter) that transformers computes in "
        "float32: a weight is wrong, mixed up or missing in the server, or transformers computes the model differently",
        "proof.whole_model",
        "Report it with the run folder, whose float32/ has both sides' numbers. proof.whole_model=off serves the model "
        "all the same.",
        "proof: the server does not compute the model of /models/x: 50% of 720 positions of random prompts have "
        "logprobs that are off by more than 1.9, expected at most 0.061, against transformers in float32.",
    ),
    Signature(
        "The text is not predicted",
        r"predicts a shipped text no better than by chance",
        "the tokens of a plain English text are no likelier at their own positions than at others: weights are wrong, "
        "or the model has not learnt such text (random weights, another language)",
        "proof.text",
        "Download the checkpoint again; proof.text=warn serves a model of which that is expected.",
        "proof: the base predicts a shipped text no better than by chance: its tokens are 0.03 nats likelier at their "
        "own positions than at others, expected above 0.12, and the whole model was not compared with transformers: "
        "29.3 GiB on disk, more than proof.whole_model_gib=2",
    ),
    Signature(
        "The adapter does nothing",
        r"base and adapter give the same first-token logprobs",
        "base and adapter answer alike: the adapter's B matrices are zero, or it is not the trained one",
        "lora.path",
        "Choose the folder of the trained adapter.",
        "lora.west: base and adapter give the same first-token logprobs (largest difference 0, expected more "
        "than 0.0001)",
    ),
    Signature(
        "NCCL",
        r"NCCL error|ncclInternalError|ncclUnhandledCudaError|ncclSystemError|ncclInvalidUsage|DistBackendError",
        "the GPUs of the server could not talk to each other",
        "server.extra_args",
        "Set NCCL_DEBUG=INFO and start again; often shared memory is too small (docker --shm-size), or "
        "NCCL_P2P_DISABLE=1 is needed.",
        "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3384, unhandled cuda error",
        configuration=False,
    ),
    Signature(
        "CUDA is not usable",
        r"CUDA driver version is insufficient|no CUDA-capable device|Found no NVIDIA driver|"
        r"no kernel image is available for execution",
        "torch was built for another CUDA, or the driver does not offer a GPU",
        "server.device",
        "Set server.device=cpu, or install the driver that this torch needs.",
        "RuntimeError: Found no NVIDIA driver on your system.",
    ),
    Signature(
        "The checkpoint has code of its own",
        r"trust_remote_code=True|contains custom code which must be executed",
        "the checkpoint comes with Python code of its own, which runs only when you allow it",
        "model.trust_remote_code",
        "Read that code, then set model.trust_remote_code=true.",
        "ValueError: The repository /models/x contains custom code which must be executed to correctly load the model.",
    ),
    Signature(
        "A model config that transformers does not accept",
        r"StrictDataclass\w*ValidationError|Field '\w+' expected .*\(value: |"
        r"Missing required keys in `rope_parameters`|'(?:Deepseek|Glm|Mixtral|Qwen)\w*Config' object has no attribute",
        "a key of the checkpoint's config.json is missing, or has another type than transformers and SGLang expect",
        "model.path",
        "Correct that key in the checkpoint's config.json.",
        "TypeError: Field 'num_key_value_heads' expected int, got NoneType (value: None)",
    ),
    Signature(
        "Unknown argument of SGLang",
        r"error: unrecognized arguments|error: argument .*: (?:invalid|expected)|error: ambiguous option",
        "SGLang does not accept an argument, or its value",
        "server.extra_args",
        "Compare it with python -m sglang.launch_server --help.",
        "server.py: error: unrecognized arguments: --no-such-flag 1",
    ),
    Signature(
        "A Python package is missing",
        r"^ModuleNotFoundError: No module named",
        "the server needs a package that is not installed",
        "server.extra_args",
        "Install that package, or leave out the option that needs it.",
        "ModuleNotFoundError: No module named 'prometheus_client'",
    ),
    Signature(
        "Disk full",
        r"No space left on device|Errno 28",
        "a disk, or /dev/shm, is full",
        "paths.runs",
        "Free space, or put paths.runs and TMPDIR elsewhere; in a container raise --shm-size.",
        "OSError: [Errno 28] No space left on device",
        configuration=False,
    ),
    Signature(
        "Too many open files",
        r"Too many open files|Errno 24\]",
        "the limit of open files is lower than the number of connections and weights files",
        "server.max_running_requests",
        "Raise it with ulimit -n 65536 (LimitNOFILE in a systemd unit).",
        "OSError: [Errno 24] Too many open files",
        configuration=False,
    ),
    Signature(
        "Too many threads",
        r"can't start new thread|pthread_create failed|BlockingIOError: \[Errno 11\]",
        "no more processes and threads may be started: the user's limit, or that of the container",
        "kt.cpuinfer",
        "Raise ulimit -u (TasksMax= in a systemd unit, --pids-limit in Docker), or end other processes; with "
        "ulimit -v, threads' stacks may be what does not fit.",
        "RuntimeError: can't start new thread",
        configuration=False,
    ),
    Signature(
        "The scheduler hung",
        r"[Ww]atchdog timeout",
        "one batch took longer than SGLang's watchdog allows",
        "server.extra_args",
        "Long prompts on few cores need time: lower --chunked-prefill-size, or raise --watchdog-timeout.",
        "Scheduler watchdog timeout (self.watchdog_timeout=300, self.soft=False)",
        configuration=False,
    ),
)

# Searched only if no process reports the exception that it failed with: SGLang ends the others by signals.
SIGNALS = (
    Signature(
        "Killed while a disk was full",
        rf"(?:{KILL.pattern}|{BUS.pattern}).*{re.escape(NO_ROOM)}",
        "a process of the server was killed, and a disk is full, so that its log may lack why",
        "paths.runs",
        "Free space there, or put paths.runs elsewhere; in a container raise --shm-size for /dev/shm.",
        f"the main process ended with exit code -9 {NO_ROOM} /data/runs)",
        configuration=False,
    ),
    Signature(
        "Illegal instruction",
        r"exit code:? -4\b|SIGILL|Illegal instruction",
        "a compiled library uses instructions that this CPU does not have",
        "kt.method",
        "Reinstall kt-launch on this machine; kt-launch doctor names the instruction sets of wheel and CPU.",
        "Subprocess scheduler_0 (pid=10703) crashed with exit code -4. Triggering SIGQUIT for cleanup...",
    ),
    Signature(
        "Bus error",
        BUS.pattern,
        "a file mapped into memory became shorter, or /dev/shm is full",
        "model.path",
        "Do not change a checkpoint while it is served; in a container raise --shm-size.",
        "Subprocess scheduler_0 (pid=10703) crashed with exit code -7. Triggering SIGQUIT for cleanup...",
        configuration=False,
    ),
    Signature(
        "Segmentation fault",
        r"exit code:? -11\b|SIGSEGV|Segmentation fault",
        "compiled code accessed memory that it does not own",
        "kt.method",
        "A bug: report it with the run folder; kt-launch doctor tests each kernel on this machine.",
        "RuntimeError: Rank 0 scheduler died during initialization (exit code: -11).",
        configuration=False,
    ),
    Signature(
        "Killed by somebody",
        rf"(?:{KILL.pattern}).*{re.escape(NOT_FOR_MEMORY)}",
        "a process of the server was killed by a user or a program, not by the kernel for lack of memory",
        "server",
        "Look for who did it: a batch system's limits, a supervisor, earlyoom or systemd-oomd (journalctl).",
        f"Subprocess scheduler_0 (pid=10703) crashed with exit code -9. Triggering SIGQUIT for cleanup... "
        f"{NOT_FOR_MEMORY}",
        configuration=False,
    ),
    Signature(
        "Killed",
        KILL.pattern,
        "a process of the server was killed: by the kernel for lack of memory (which cannot be seen from here), or "
        "by someone",
        "server.max_total_tokens",
        "Look at dmesg -T | grep -i oom; if memory was short, lower server.max_total_tokens.",
        "RuntimeError: Rank 0 scheduler died during initialization (exit code: -9).",
        configuration=False,
    ),
)

SIGNATURES = CAUSES + SIGNALS

# Errors that only report that another process failed first.
CONSEQUENCE = re.compile(
    r"EOFError|Initialization failed\. Please see|scheduler died during initialization|KeyboardInterrupt|"
    r"BrokenPipeError|"
    r"ConnectionResetError|CancelledError|SystemExit"
)
ENDS_ITSELF = "kill_process_tree called"
"""What SGLang's main process logs before it kills the others and itself."""
HARMLESS = re.compile(r"Ignore import error|OpenAI Responses API .* disabled")
PREFIX = re.compile(r"^\[\d{4}-[^\]]*\]\s*")
ACCESS = re.compile(r'(?:INFO:\s+)?\S+ - "[A-Z]+ ')
"""A line of Uvicorn's access log, which contains a request's path."""
DEATH = re.compile(r"Subprocess \S+ \(pid=\d+\) crashed|.*[Ww]atchdog timeout \(|kill_process_tree called")
"""What SGLang's main process logs about processes that ended."""
FAILED_PROCESS = re.compile(r"(\w+) hit an exception: Traceback")
RAISED = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt|Timeout|Died|Full|Empty)\b.*")
OURS = re.compile(r"kt_model\.errors\.LaunchErrors?: (?P<where>.+?): (?P<mistake>.+)")
"""A user's mistake that our own code found inside the server, reported in the launcher's form."""
COMPLAINT = re.compile(r"^(?:\S+: error: |kt_sglang: |Error: ).*")


@dataclass(frozen=True)
class Diagnosis:
    """What is known about a crash: its signature, if any, and the log lines that show it.

    where: the key or file of a mistake found by our own code; the last line is then its text.
    """

    signature: Signature | None
    lines: tuple[str, ...] = ()
    where: str = ""
    was_ready: bool = False

    @property
    def configuration(self) -> bool:
        """Whether the same start would fail the same way."""
        if self.signature is None:
            return bool(self.where)
        return self.signature.configuration and not (self.was_ready and self.signature.starting)

    @property
    def cause(self) -> str:
        """One sentence without a full stop, or ''."""
        evidence = self.lines[-1] if self.lines else ""
        if self.signature is None:
            return evidence
        return f"{self.signature.cause} ({evidence})" if evidence else self.signature.cause


class Crashed(ServerDidNotStart):
    """The server ended before it was ready; carries the diagnosis."""

    def __init__(self, what: str, diagnosis: Diagnosis, log_file: Path) -> None:
        signature = diagnosis.signature
        problem = f"{what}{': ' if diagnosis.cause else ''}{diagnosis.cause}"
        log = f"its log is {log_file}"
        fix = f"{signature.fix} ({log}; {DOCS}#{signature.name})" if signature else f"I{log[1:]}"
        if diagnosis.where:
            problem, fix = diagnosis.cause, f"{what[0].upper()}{what[1:]}; {log}"
        super().__init__(diagnosis.where or (signature.key if signature else "server"), problem, fix)
        self.diagnosis = diagnosis


def diagnose(
    log: str,
    exit_code: int | None = None,
    memory_kills: str = "",
    was_ready: bool = False,
    aside: str = "",
) -> Diagnosis:
    """The first signature that matches; else the exception of the process that failed first.

    exit_code: of the server's main process, negative for a signal. memory_kills: what the kernel says about processes
    that it killed for lack of memory while the server ran. was_ready: requests have been answered since, so only what
    the dead process says about its own end counts. aside: see aside_of.
    """
    lines = _evidence(log, was_ready)
    log = "\n".join(lines)
    found = _diagnose(log, [_bare(line) for line in lines], exit_code, memory_kills, aside)
    return replace(found, was_ready=was_ready)


def aside_of(full: Path | None, not_for_memory: bool) -> str:
    """What the machine says about a kill. full: a folder whose disk has no room. not_for_memory: the kernel counts
    kills for lack of memory, and there was none."""
    return f"{NO_ROOM} {full})" if full else NOT_FOR_MEMORY if not_for_memory else ""


def _diagnose(log: str, lines: list[str], exit_code: int | None, memory_kills: str, aside: str) -> Diagnosis:
    if memory_kills:
        lines.append(memory_kills)
    if exit_code is not None and exit_code < 0 and not any(ENDS_ITSELF in line for line in lines):
        lines.append(f"the main process ended with exit code {exit_code}")
    if aside:
        lines = [f"{line} {aside}" if KILL.search(line) or BUS.search(line) else line for line in lines]
    ours = OURS.fullmatch(first_failure(log))
    if ours:
        return Diagnosis(None, (ours["mistake"],), ours["where"])
    for signature in CAUSES if _fatal_exceptions(log) else SIGNATURES:
        pattern = re.compile(signature.pattern)
        found = [line for line in lines if pattern.search(line)]
        if found:
            return Diagnosis(signature, tuple(_cut(line) for line in found[-3:]))
    raised = first_failure(log)
    return Diagnosis(None, (_cut(raised),) if raised else ())


def _evidence(log: str, was_ready: bool) -> list[str]:
    """The lines that no client can have written: the access log contains request paths, and a handled error is not the
    cause. For a server that had been ready, only the last fatal traceback and what ended its processes."""
    lines = [line for line in log.splitlines() if not HARMLESS.search(line) and not ACCESS.match(_bare(line))]
    if not was_ready:
        return lines
    begins = [number for number, line in enumerate(lines) if FAILED_PROCESS.search(line)]
    fatal = _traceback(lines[begins[-1] :]) if begins else []
    return fatal + [line for line in lines if DEATH.match(_bare(line))]


def _traceback(lines: list[str]) -> list[str]:
    """From its first line to the one before the next log line."""
    ends = (number for number, line in enumerate(lines) if number and PREFIX.match(line))
    return lines[: next(ends, len(lines))]


def first_failure(log: str) -> str:
    """The exception of the process that failed, not of those that noticed it; '' if there is none."""
    raised = _fatal_exceptions(log) or [text for _, text in _exceptions(log) if not CONSEQUENCE.search(text)]
    if raised:
        return raised[-1]
    complaints = [line for line in map(_bare, log.splitlines()) if COMPLAINT.match(line) or RAISED.match(line)]
    return complaints[-1] if complaints else ""


def _fatal_exceptions(log: str) -> list[str]:
    """The exceptions that SGLang's processes report as fatal."""
    return [text for process, text in _exceptions(log) if process and not CONSEQUENCE.search(text)]


def _exceptions(log: str) -> list[tuple[str, str]]:
    """The last line of each traceback, with the process that reports it as fatal ('' for others)."""
    found: list[tuple[str, str]] = []
    process, inside = "", False
    for line in log.splitlines():
        if "Traceback (most recent call last):" in line:
            failed = FAILED_PROCESS.search(line)
            process, inside = failed[1] if failed else process, True
        elif inside and line and not line[0].isspace():
            text = _bare(line)
            if RAISED.match(text) or re.match(r"^[\w.]+: ", text):
                found.append((process, text))
            inside = False
        elif not inside and line and line[0] == "[":
            process = ""
    return found


def _bare(line: str) -> str:
    return PREFIX.sub("", line).strip()


def _cut(line: str) -> str:
    text = line.strip()
    return text if len(text) <= LONGEST_LINE else f"{text[: LONGEST_LINE - 3]}..."


def troubleshooting_page() -> str:
    """docs/troubleshooting.md."""
    parts = [
        "# Troubleshooting",
        "<!-- Written by `python -m kt_launch.watching.diagnosis`; change launcher/kt_launch/watching/diagnosis.py "
        "instead. -->",
        "When the server does not start (exit code 3) or ends unexpectedly, kt-launch looks for these signatures in "
        "its log, reports the cause and the key to change, and keeps the log in the run folder "
        "(`kt-launch logs`). An unknown crash is reported with the exception of the process that failed first. With "
        "`server.restarts=N` a server that had been ready is started again, but never when its signature says "
        "*configuration*.",
        "| signature | key to change | |",
    ]
    table = ["| --- | --- | --- |"]
    for row in SIGNATURES:
        kind = "configuration" if row.configuration else "may be restarted"
        table.append(f"| [{row.title}](#{row.name}) | `{row.key}` | {kind} |")
    page = "\n\n".join(parts) + "\n" + "\n".join(table) + "\n"
    for row in SIGNATURES:
        cause = row.cause[0].upper() + row.cause[1:]
        page += f"\n## {row.title}\n\n{cause}.\n\nKey: `{row.key}`. {row.fix}\n\n    {row.example}\n"
    return page


if __name__ == "__main__":
    print(troubleshooting_page(), end="")
