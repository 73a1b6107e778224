"""What a run was started from, so that it can be repeated and compared: the typed command, versions, the machine,
environment variables, and the SHA-256 of every file it read. Secrets are left out.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from kt_launch.machine.folders import CHECKOUT, PACKAGE
from kt_launch.machine.host import Host
from kt_model.atomic_file import read_regular
from kt_model.checkpoint import read_checkpoint
from kt_model.digests import Cancelled, Digests
from kt_model.errors import LaunchError
from kt_model.experts import ExpertSource
from kt_model.jsonfile import first_mistake, read_json_or_empty, write_json
from kt_model.methods import method_of
from kt_model.plan import LaunchPlan
from kt_model.printable import say
from kt_model.redaction import is_secret, mask, secrets_of
from kt_model.tensors.folder import unread_files, weight_files

FILE, PLAN = "lock.json", "plan.json"
READ_SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt", ".py", ".tiktoken")
SET = "(set, not recorded)"
SITES = {"site-packages", "dist-packages"}
# Variables that change what a server does: they affect the loader, Python, the math libraries, torch or SGLang.
ENVIRONMENT = re.compile(
    r"(?:PATH|HOME|TZ|LANG|LC_\w+|TMPDIR|(?:https?|no|all)_proxy|(?:LD|PYTHON|OMP|KMP|GOMP|MKL|OPENBLAS|NUMEXPR|MALLOC|"
    r"CUDA|NVIDIA|NCCL|GLOO|UCX|TORCH|TORCHINDUCTOR|PYTORCH|TRITON|SGLANG|SGL|FLASHINFER|HF|HUGGINGFACE|HUGGING_FACE|"
    r"TRANSFORMERS|TOKENIZERS|SAFETENSORS|KT|XDG)_?\w*)",
    re.IGNORECASE,
)
HEADER = re.compile(r"^(Name|Version):[ \t]*(.*?)[ \t]*$", re.MULTILINE)
OWN = re.compile(r"KT_LAUNCH_(?:RUNS|CACHE|MODELS|LORAS|CONFIG_DIR|CONFIG_FILE|OWN_ADMIN_KEY|START|LAUNCHER)")
"""Read by the launcher only; their effect is in the plan."""


class Lock(BaseModel):
    """lock.json. Sections that the run ended too early to write are absent."""

    model_config = ConfigDict(extra="allow")

    typed: list[str] = []
    folder: str = ""
    python: dict[str, str] | None = None
    packages: dict[str, str] | None = None
    git: dict[str, str] | None = None
    machine: dict[str, Any] | None = None
    environment: dict[str, str] | None = None
    files: dict[str, str] | None = None
    plan: dict[str, str] | None = None
    """SHA-256 of the plan.json beside it."""


@dataclass(frozen=True)
class Difference:
    """One fact that has changed."""

    what: str
    then: str
    now: str

    def __str__(self) -> str:
        return f"{self.what}: {_short(self.then)} then, {_short(self.now)} now"


def read_lock(plan: LaunchPlan, host: Host, typed: list[str]) -> dict[str, Any]:
    """Everything, by section."""
    return read_quick_part(plan, host, typed) | read_slow_part(plan)


def read_quick_part(plan: LaunchPlan, host: Host, typed: list[str]) -> dict[str, Any]:
    """The sections that take no time to read."""
    secrets = secrets_of()
    return {
        "typed": [mask(override, secrets) for override in typed],
        "folder": str(Path.cwd()),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": {"executable": plan.argv[0], "version": platform.python_version()},
        "machine": _machine(host),
        "environment": read_environment(os.environ),
    }


def read_slow_part(plan: LaunchPlan, cancel: threading.Event | None = None) -> dict[str, Any]:
    """Packages, git state, and the hash of every file. Raises Cancelled."""
    return {"packages": packages(), "git": _git(CHECKOUT), "files": hash_files(plan, cancel)}


def read_recorded(run_folder: Path) -> dict[str, Any]:
    """A run's lock, {} if it wrote none. Raises LaunchError if the file is damaged."""
    file = run_folder / FILE
    try:
        return Lock.model_validate_json(read_regular(file)).model_dump(exclude_unset=True)
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError) as failure:
        mistake = f"{failure.strerror}" if isinstance(failure, OSError) else first_mistake(failure) or "no JSON"
        raise LaunchError("run", f"{file} is damaged ({mistake})", "Choose another run.") from failure


def plan_digest(folder: Path) -> dict[str, Any]:
    """The section of a lock that shows later whether the plan beside it was edited."""
    return {"plan": {PLAN: f"sha256:{hashlib.sha256((folder / PLAN).read_bytes()).hexdigest()}"}}


def write_lock(lock: Mapping[str, Any], folder: Path) -> None:
    """Atomically."""
    write_json(folder / FILE, lock, private=True)


class LockCompletion:
    """Completes a run's lock in a thread while its server starts, because packages, git state and hashes take time."""

    def __init__(self, plan: LaunchPlan, folder: Path) -> None:
        self._plan, self._folder = plan, folder
        self._cancel = threading.Event()
        self._thread = threading.Thread(target=self._complete, name="lock", daemon=True)

    def __enter__(self) -> LockCompletion:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._cancel.set()
        self._thread.join()

    def _complete(self) -> None:
        lock = read_json_or_empty(self._folder / FILE)
        try:
            if "files" not in lock:
                write_lock(lock | read_slow_part(self._plan, self._cancel), self._folder)
            warn_of_other_weights(self._plan, self._cancel)
        except (Cancelled, LaunchError, OSError, ValueError):
            return  # the run ended early, or a file disappeared: the quick part remains


def warn_of_other_weights(plan: LaunchPlan, cancel: threading.Event) -> None:
    """Warn if the quantized experts belong to another checkpoint; the next start refuses them. Reads the experts unless
    their digest is cached. Raises Cancelled, LaunchError and OSError."""
    from kt_model.weights.folder import read_folder
    from kt_model.weights.identity import read_weights, require_same_weights

    if not method_of(plan.value("kt.method")).quantized:
        return
    base = read_checkpoint(Path(plan.value("model.path")))
    source = ExpertSource(base)
    folder = read_folder(Path(plan.value("kt.weight_path")), plan.value("kt.method"), base)
    if folder.manifest.weights is not None:
        weights = read_weights(source, cancel, quiet=True)
        try:
            require_same_weights(folder.path, folder.manifest.weights, source, weights)
        except LaunchError as failure:
            say(f"warning: {failure}", file=sys.stderr)


def read_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter to a server. For secrets, only that they are set."""
    chosen = {name: environ[name] for name in sorted(environ) if is_recorded(name)}
    return {name: SET if is_secret(name) else mask(value, ()) for name, value in chosen.items()}


def is_recorded(variable: str) -> bool:
    """Whether an environment variable matters to a server."""
    return ENVIRONMENT.fullmatch(variable) is not None and not OWN.fullmatch(variable)


def hash_files(plan: LaunchPlan, cancel: threading.Event | None = None) -> dict[str, str]:
    """SHA-256 by path of the checkpoint, the expert weights, the adapters and the compiled kernels."""
    with Digests(cancel=cancel) as digests:
        return {str(file): f"sha256:{digests.sha256(file)}" for file in _files(plan)}


def differences(
    then: Mapping[str, Any], now: Mapping[str, Any], names: Mapping[str, str] | None = None
) -> list[Difference]:
    """The differences between two locks, one per fact. names: folder -> what it is to the run, for files."""
    found = []
    for section in ("plan", "python", "packages", "git", "machine", "environment", "files"):
        if not then.get(section):
            continue
        old, new = then[section], now.get(section) or {}
        for key in [*old, *(key for key in new if key not in old)]:
            if old.get(key) != new.get(key):
                what = _name_file(key, names or {}) if section == "files" else f"{section} {key}"
                found.append(Difference(what, _shown(old.get(key)), _shown(new.get(key))))
    return found


def _name_file(path: str, names: Mapping[str, str]) -> str:
    folder, _, name = path.rpartition("/")
    return f"{names[folder]}: {path}" if folder in names else f"file {name}: {path}"


def _files(plan: LaunchPlan) -> Iterator[Path]:
    model = Path(plan.value("model.path"))
    unread = {model / name for name in unread_files(model, weight_files(model))}
    unread |= {Path(folder, name) for folder in plan.adapters.values() for name in _left_over(Path(folder))}
    for folder in filter(Path.is_dir, map(Path, plan.folder_names)):  # one of quantized experts may not be made yet
        read = (file for file in folder.iterdir() if file.suffix in READ_SUFFIXES and file not in unread)
        yield from sorted(file for file in read if file.is_file())
    yield from kernel_files()


def kernel_files() -> list[Path]:
    """The compiled kernels."""
    found = util.find_spec("kt_kernels")
    places = (found.submodule_search_locations or []) if found else []
    return sorted(file for place in places for file in Path(place).glob("_core*.so"))


def _left_over(adapter: Path) -> list[str]:
    """Files in an adapter's folder that the importer ignores."""
    from kt_model.importer.files import iterate_files
    from kt_model.importer.stray_files import left_over

    return left_over(adapter, [file.name for file in iterate_files(adapter)])


def packages() -> dict[str, str]:
    """Versions of the installed packages by name, without those vendored inside other packages: importing Ray puts some
    on sys.path."""
    own = [folder for folder in sys.path if not SITES & {parent.name for parent in Path(folder).parents}]
    heads = map(_head, metadata.distributions(path=own))
    found = {head["Name"]: head.get("Version", "") for head in heads if head.get("Name")}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _head(installed: metadata.Distribution) -> dict[str, str]:
    """Name and version; `installed.name` parses the package's whole description, each time it is asked."""
    text = installed.read_text("METADATA") or installed.read_text("PKG-INFO") or ""
    return dict(HEADER.findall(text.partition("\n\n")[0]))


def _machine(host: Host) -> dict[str, Any]:
    return {
        "name": platform.node(),
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
        "cpu": host.cpu_model,
        "cpu flags": " ".join(sorted(host.cpu_flags)),
        "cores": len(host.cores),
        "affinity": sorted(host.affinity),
        "cgroup CPUs": host.quota_cpus,
        "cgroup memory bytes": host.memory_limit_bytes,
        "NUMA nodes": [{"number": node.number, "cpus": sorted(node.cpus)} for node in host.nodes],
        "memory bytes": host.memory_bytes,
        "huge pages": host.huge_pages,
        "GPUs": [f"{gpu.name}, {gpu.memory_bytes >> 20} MiB" for gpu in host.gpus],
    }


def _git(checkout: Path) -> dict[str, str] | None:
    """Commit and local changes, if the product runs from a checkout rather than from a wheel."""
    if not (checkout / ".git").exists() or checkout / "launcher" / PACKAGE.name != PACKAGE:
        return None
    try:
        head, changes = _ask_git(checkout, "rev-parse", "HEAD"), _ask_git(checkout, "diff", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
    changed = f"sha256 of git diff: {hashlib.sha256(changes.encode()).hexdigest()}" if changes else "none"
    return {"commit": head.strip(), "local changes": changed}


def _ask_git(checkout: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(checkout), *words], capture_output=True, text=True, timeout=20, check=True, errors="replace"
    )
    return done.stdout


def _shown(value: Any) -> str:
    return "absent" if value is None else str(value)


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."
