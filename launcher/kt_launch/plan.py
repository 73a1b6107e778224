"""Turns a config and the facts into the plan of one launch: every "auto" becomes a value with its source. Pure.

Mistakes are collected and reported together. Starts nothing, reads nothing but the plan file itself.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_launch.errors import LaunchError, Problems
from kt_launch.fit import FRACTIONS, Demand, Fit, estimate, gib, nearest_fits, padding_percent
from kt_launch.rules import Situation, clashes

if TYPE_CHECKING:
    from kt_launch.adapters import AdapterFacts
    from kt_launch.checkpoint import Checkpoint
    from kt_launch.config import Config
    from kt_launch.host import Disk, Host, Port
    from kt_launch.sources import Sources
    from kt_launch.weights.packed import Outlook

SERVER_COMMAND = ("-P", "-m", "kt_sglang.server")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")


@dataclass(frozen=True)
class Method:
    """Where a method's base weights are read from, and whether they come with scales."""

    weights: str
    scales: bool


METHODS: Mapping[str, Method] = {
    "AMXBF16_SFT": Method("model.path", scales=False),
    "AMXINT8_SFT": Method("kt.weight_path", scales=True),
    "AMXINT4_SFT": Method("kt.weight_path", scales=True),
}


@dataclass(frozen=True)
class DeviceRules:
    """What SGLang is told on a device unless the user says otherwise; None leaves it to SGLang."""

    backends: Mapping[str, str | None]
    limits: Mapping[str, float | None]
    arguments: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


DEVICES: Mapping[str, DeviceRules] = {
    "cpu": DeviceRules(
        backends={"attention_backend": "torch_native", "sampling_backend": "pytorch", "lora_backend": "torch_native"},
        limits={"context_length": 4096, "max_running_requests": 4, "mem_fraction": 0.8},
        arguments=("--sleep-on-idle",),
        # OpenMP's threads spin, and would spin against the expert threads; compiling small CPU operators takes longer
        # than it saves.
        env={"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
    ),
    "cuda": DeviceRules(
        backends={"attention_backend": None, "sampling_backend": None, "lora_backend": "triton"},
        limits={"context_length": None, "max_running_requests": None, "mem_fraction": None},
        arguments=("--disable-decode-cuda-graph", "--disable-prefill-cuda-graph"),
    ),
}


@dataclass(frozen=True)
class Resolved:
    """A value, and why it is that."""

    value: Any
    source: str


@dataclass(frozen=True)
class Place:
    """A folder that was asked for, the key that names it, and where that came from."""

    name: str
    path: Path
    key: str
    source: str


@dataclass(frozen=True)
class LaunchPlan:
    """Everything a launch needs, and the record of it."""

    config: Mapping[str, Any]
    """As validated, before anything was resolved."""
    resolved: Mapping[str, Resolved]
    argv: tuple[str, ...]
    """The whole command."""
    env: Mapping[str, str]
    warnings: tuple[str, ...]

    def value(self, key: str) -> Any:
        return self.resolved[key].value

    def placed_in(self, folder: Path) -> LaunchPlan:
        """The same plan, with the run folder it is written to."""
        placed = Resolved(str(folder), "derived: time and model name, below the runs' root")
        return replace(self, resolved={**self.resolved, "run.folder": placed})

    def to_json(self, indent: int | None = 2) -> str:
        resolved = {key: {"value": item.value, "source": item.source} for key, item in self.resolved.items()}
        content = {
            "config": self.config,
            "resolved": resolved,
            "argv": list(self.argv),
            "env": dict(self.env),
            "warnings": list(self.warnings),
        }
        return json.dumps(content, indent=indent, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> LaunchPlan:
        content = json.loads(text)
        resolved = {key: Resolved(item["value"], item["source"]) for key, item in content["resolved"].items()}
        argv, warnings = tuple(content["argv"]), tuple(content["warnings"])
        return cls(content["config"], resolved, argv, content["env"], warnings)

    @classmethod
    def read(cls, path: Path) -> LaunchPlan:
        return cls.from_json(Path(path).read_text())

    def write(self, path: Path) -> None:
        """All or nothing, and readable by its owner only."""
        draft = Path(path).with_suffix(".tmp")
        draft.touch(mode=0o600)
        draft.write_text(self.to_json() + "\n")
        draft.replace(path)


def locate_model(config: Config, sources: Sources, environ: Mapping[str, str]) -> Place:
    """The checkpoint's folder."""
    model = config.model
    path, source = _locate("model", model.path, model.folder, _model_root(config, sources, environ), sources)
    return Place(model.name or _plain_name(path), path, "model.path", source)


def locate_adapters(config: Config, sources: Sources, environ: Mapping[str, str], problems: Problems) -> list[Place]:
    """The adapters' folders: those of the presets, and the one given by hand."""
    lora = config.lora
    names = list(lora.adapters)
    only = names[0] if len(names) == 1 else None
    places = {}
    for name, adapter in lora.adapters.items():
        if lora.path and name == (lora.name or only):
            continue
        key = f"lora.adapters.{name}"
        with problems.collect():
            path, source = _locate(key, adapter.path, adapter.folder, _adapter_root(config, sources, environ), sources)
            renamed = lora.name if lora.name and not lora.path and only else name
            places[renamed] = Place(renamed, path, f"{key}.path", source)
    if lora.path:
        path = absolute(lora.path)
        given = lora.name or only or _plain_name(path)
        places[given] = Place(given, path, "lora.path", sources.of("lora.path"))
    elif lora.name and not only:
        problems.add("lora.name", f"{lora.name} names no adapter", "Type lora.path=/its/folder as well.")
    return list(places.values())


def _plain_name(path: Path) -> str:
    """A folder's name as a request may write it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.name).strip("-._") or "unnamed"


def absolute(path: str) -> Path:
    """A path as typed: ~ is the home, relative ones start at the working folder."""
    return Path(os.path.normpath(Path(path).expanduser().absolute()))


def _locate(key: str, path: str | None, folder: str | None, root: Resolved, sources: Sources) -> tuple[Path, str]:
    if path:
        return absolute(path), sources.of(f"{key}.path")
    if not folder:
        raise LaunchError(f"{key}.path", "no folder given", f"Type {key}.path=/its/folder.")
    if not root.value:
        problem = f"the folder {folder} is expected below a root, but none is given"
        raise LaunchError(f"{key}.path", problem, f"Set {root.source}, or type {key}.path=/its/folder.")
    return absolute(root.value) / folder, f"{root.source}; {sources.of(f'{key}.folder')}"


def _model_root(config: Config, sources: Sources, environ: Mapping[str, str]) -> Resolved:
    return _root("paths.models", config.paths.models, ("KT_LAUNCH_MODELS",), sources, environ)


def _adapter_root(config: Config, sources: Sources, environ: Mapping[str, str]) -> Resolved:
    root = _root("paths.loras", config.paths.loras, ("KT_LAUNCH_LORAS",), sources, environ)
    if root.value:
        return root
    models = _model_root(config, sources, environ)
    return models if models.value else root


def _root(
    key: str, given: str | None, variables: Sequence[str], sources: Sources, environ: Mapping[str, str]
) -> Resolved:
    if given:
        return Resolved(given, sources.of(key))
    for variable in variables:
        if environ.get(variable):
            return Resolved(environ[variable], f"environment: {variable}={environ[variable]}")
    return Resolved(None, variables[0])


@dataclass(frozen=True)
class Facts:
    """What was read before resolving; None for what could not be read, of which the mistake is known already."""

    host: Host
    port: Port
    model: Place | None
    checkpoint: Checkpoint | None
    adapters: Sequence[AdapterFacts]
    adapter_sources: Mapping[str, str] = field(default_factory=dict)
    experts: Path | None = None
    """The folder of quantized experts, for a method that has one."""
    disk: Disk | None = None
    """What the checkpoint lies on."""
    packed: Outlook | None = None
    """What the start will find in the packed cache; None where it is off or the experts are not known."""


def resolve(config: Config, facts: Facts, sources: Sources, problems: Problems) -> LaunchPlan:
    """The plan, or all mistakes together."""
    draft = _Draft(config, facts, sources, problems)
    draft.resolve_model()
    draft.resolve_adapters()
    draft.resolve_device()
    draft.resolve_experts()
    draft.resolve_threads()
    draft.resolve_server()
    draft.check_clashes()
    draft.resolve_fit()
    problems.raise_if_any()
    return LaunchPlan(
        config=config.model_dump(mode="json"),
        resolved=draft.resolved,
        argv=draft.argv(),
        env={**draft.rules.env, **draft.adapter_options(), **draft.profiling(), **draft.packed_cache()},
        warnings=tuple(draft.warnings),
    )


class _Draft:
    """A plan in the making: one method a subject, each reading the config and writing resolved values."""

    def __init__(self, config: Config, facts: Facts, sources: Sources, problems: Problems) -> None:
        self.config = config
        self.facts = facts
        self.sources = sources
        self.problems = problems
        self.resolved: dict[str, Resolved] = {}
        self.warnings: list[str] = []

    @property
    def rules(self) -> DeviceRules:
        return DEVICES[self.value("server.device")]

    @property
    def expert_lora(self) -> bool:
        return any(adapter.reaches_experts for adapter in self.facts.adapters)

    def set(self, key: str, value: Any, source: str) -> None:
        self.resolved[key] = Resolved(value, source)

    def value(self, key: str) -> Any:
        return self.resolved[key].value

    def given_or(self, key: str, given: Any, value: Any, source: str) -> Any:
        """What the user gave, with where; else the value with its source."""
        if given is None:
            self.set(key, value, source)
        else:
            self.set(key, given, self.sources.of(key))
        return self.value(key)

    def resolve_model(self) -> None:
        model, base = self.facts.model, self.facts.checkpoint
        if model is None:
            return
        self._check_name("model.name", model.name)
        self.set("model.path", str(model.path), model.source)
        given = self.config.model.name
        self.given_or("model.name", given, model.name, "derived: the checkpoint's folder")
        if base is None:
            return
        probed = f"probed: {base.path / 'config.json'}"
        self.set("model.family", base.family.name, probed)
        self.set("model.num_experts", base.num_experts, probed)
        self.set("model.top_k", base.top_k, probed)
        self.set("model.hidden_size", base.hidden_size, probed)
        self.set("model.moe_intermediate_size", base.moe_intermediate_size, probed)
        self.set("model.moe_layers", len(base.moe_layers), probed)
        if self.facts.disk is not None:
            self.set("model.disk", self.facts.disk.kind, "probed: the disk below the checkpoint")

    def resolve_adapters(self) -> None:
        for adapter in self.facts.adapters:
            key = f"lora.{adapter.name}"
            probed = f"probed: {adapter.path / 'adapter_config.json'}"
            self._check_name("lora.name", adapter.name)
            self.set(f"{key}.path", str(adapter.path), self.facts.adapter_sources.get(adapter.name, "default"))
            self.set(f"{key}.rank", adapter.rank, probed)
            self.set(f"{key}.alpha", adapter.alpha, probed)
            self.set(f"{key}.scale", adapter.scale, f"derived: {adapter.scale_rule}")
            places = ", ".join(f"{count} {place}" for place, count in adapter.places.items())
            self.set(f"{key}.reaches", places, "probed: the adapter's tensor names")
            if adapter.missing_pairs:
                self.warnings.append(f"{key}: {adapter.missing_pairs} missing expert projections add nothing")
        if self.facts.adapters:
            self._resolve_adapter_room()

    def _resolve_adapter_room(self) -> None:
        adapters, lora = self.facts.adapters, self.config.lora
        largest = max(adapter.rank for adapter in adapters)
        rank = self.given_or("lora.max_rank", lora.max_rank, largest, "derived: largest rank of the adapters")
        if rank < largest:
            self.problems.add(
                "lora.max_rank", f"{rank}, but an adapter has rank {largest}", f"Type lora.max_rank={largest}."
            )
        source = "derived: the adapters and the bare model"
        self.given_or("lora.max_per_batch", lora.max_per_batch, len(adapters) + 1, source)

    def _check_name(self, key: str, name: str) -> None:
        if not NAME.fullmatch(name):
            problem = f"{name!r} cannot stand in a request; letters, digits and . _ - / are expected"
            self.problems.add(key, problem, f"Type {key}=<a plain name>.")

    def resolve_device(self) -> None:
        host, wanted = self.facts.host, self.config.server.device
        usable = bool(host.gpus) and host.cuda_torch
        if wanted == "auto":
            self.set("server.device", "cuda" if usable else "cpu", f"probed: {_describe_gpus(host)}")
        else:
            self.set("server.device", wanted, self.sources.of("server.device"))
        if wanted == "cuda" and not usable:
            self.problems.add("server.device", f"cuda, but {_describe_gpus(host)}", "Type server.device=cpu.")

    def resolve_experts(self) -> None:
        kt = self.config.kt
        method = METHODS[kt.method]
        self.set("kt.method", kt.method, self.sources.of("kt.method"))
        if method.weights == "model.path":
            self._resolve_own_weights(kt.weight_path)
        elif self.facts.experts is not None:
            made = (
                "derived: kt.prepare makes it where it is missing" if kt.prepare else "derived: made by action=quantize"
            )
            source = self.sources.of("kt.weight_path") if kt.weight_path else made
            self.set("kt.weight_path", str(self.facts.experts), source)
        self._resolve_gpu_experts(kt.num_gpu_experts)
        self._resolve_packed_cache()

    def _resolve_own_weights(self, given: str | None) -> None:
        model = self.facts.model
        if model is None:
            return
        if given is not None and absolute(given) != model.path:
            problem = f"{self.config.kt.method} reads the experts from model.path, not from {given}"
            self.problems.add("kt.weight_path", problem, "Leave kt.weight_path out.")
        source = f"derived: {self.config.kt.method} reads the experts from model.path"
        self.set("kt.weight_path", str(model.path), source)

    def _resolve_packed_cache(self) -> None:
        self.set("kt.packed_cache", self.config.kt.packed_cache, self.sources.of("kt.packed_cache"))
        packed = self.facts.packed
        if packed is None:
            return
        self.set("kt.packed_entry", packed.folder and str(packed.folder), f"probed: {packed.state}")
        if packed.problem:
            self.warnings.append(f"kt.packed_cache: {packed.problem}")

    def _resolve_gpu_experts(self, given: int | None) -> None:
        reason = (
            "expert LoRA needs all routed experts on the CPU" if self.expert_lora else "all routed experts on the CPU"
        )
        count = self.given_or("kt.num_gpu_experts", given, 0, f"derived: {reason}")
        if count < 0:
            self.problems.add("kt.num_gpu_experts", f"{count}, but 0 is expected", "Type kt.num_gpu_experts=0.")
        elif count > 0:
            problem = f"{count} routed experts on the device are not built yet"
            self.problems.add("kt.num_gpu_experts", problem, "Type kt.num_gpu_experts=0.")

    def resolve_threads(self) -> None:
        host, kt = self.facts.host, self.config.kt
        threads, source = usable_threads(host)
        count = self.given_or("kt.cpuinfer", kt.cpuinfer, threads, source)
        most = _most_threads(host)
        if not 1 <= count <= most:
            problem = f"{count} threads, but 1 to {most} are expected ({source.removeprefix('probed: ')})"
            self.problems.add("kt.cpuinfer", problem, f"Type kt.cpuinfer={threads}, or leave it out.")
            return
        if count > threads:
            self.warnings.append(
                f"kt.cpuinfer: {count} threads share {threads} physical cores; {threads} is usually faster"
            )
        self._resolve_pools(count)

    def _resolve_pools(self, threads: int) -> None:
        pools, nodes = usable_pools(self.facts.host, threads), len(self.facts.host.nodes_in_use) or 1
        count = self.given_or(
            "kt.threadpool_count", self.config.kt.threadpool_count, pools, f"probed: {nodes} NUMA nodes in use"
        )
        if not 1 <= count <= threads:
            problem = f"{count} pools for {threads} threads, but 1 to {threads} are expected"
            self.problems.add("kt.threadpool_count", problem, f"Type kt.threadpool_count={pools}, or leave it out.")
            del self.resolved["kt.threadpool_count"]
            return
        self.set("kt.pools", pool_places(self.facts.host, threads, count), "derived: kt.cpuinfer, kt.threadpool_count")
        self.set("kt.instruction_set", self.facts.host.instruction_set, f"probed: {self.facts.host.cpu_model}")

    def resolve_server(self) -> None:
        server = self.config.server
        self.set("server.host", server.host, self.sources.of("server.host"))
        self._resolve_port()
        for name, backend in self.rules.backends.items():
            chosen = f"derived: for device {self.value('server.device')}" if backend else "default: SGLang chooses"
            self.given_or(f"server.{name}", getattr(server, name), backend, chosen)
        self._resolve_limits()
        self._resolve_graph()
        self._check_rotary()

    def _resolve_port(self) -> None:
        port, wanted = self.facts.port, self.config.server.port
        source = "probed: a free port" if wanted == 0 else self.sources.of("server.port")
        self.set("server.port", port.number, source)
        if port.bad_host:
            problem = f"{self.config.server.host} cannot be listened on ({port.owner})"
            fix = "Type an address of this machine: 127.0.0.1, or 0.0.0.0 for all of its addresses."
            self.problems.add("server.host", problem, fix)
        elif not port.free:
            problem = f"{wanted} on {self.config.server.host} cannot be used: {port.owner}"
            self.problems.add("server.port", problem, "Stop it, or type server.port=0 for a free port.")

    def _resolve_limits(self) -> None:
        server, base = self.config.server, self.facts.checkpoint
        device = self.value("server.device")
        for name, limit in self.rules.limits.items():
            most = (
                min(limit, base.max_position)
                if name == "context_length" and limit and base and base.max_position
                else limit
            )
            source = f"derived: for device {device}" if limit is not None else "default: SGLang chooses"
            self.given_or(f"server.{name}", getattr(server, name), most, source)
        context, requests = self.value("server.context_length"), self.value("server.max_running_requests")
        total = context * requests if device == "cpu" else None
        source = "derived: context_length x max_running_requests" if total else "default: SGLang chooses"
        self.given_or("server.max_total_tokens", server.max_total_tokens, total, source)
        if base and base.rope_type == "default" and base.max_position and context and context > base.max_position:
            problem = f"{context} tokens, but the model was made for {base.max_position}"
            self.problems.add("server.context_length", problem, f"Type server.context_length={base.max_position}.")

    def _resolve_graph(self) -> None:
        reason = (
            "the expert path with LoRA is not proven capturable"
            if self.expert_lora
            else "routed experts run on the CPU"
        )
        given = self.config.server.cuda_graph
        source = self.sources.of("server.cuda_graph") if given == "off" else f"derived: {reason}"
        self.set("server.cuda_graph", "off", source)
        if self.expert_lora and given != "off":
            self.warnings.append(f"server.cuda_graph: off, because {reason}")

    def _check_rotary(self) -> None:
        base = self.facts.checkpoint
        if base is None or self.value("server.device") != "cpu":
            return
        if base.family.needs_yarn_on_cpu and base.rope_type != "yarn":
            problem = (
                f"its rotary embedding is {base.rope_type}, but SGLang runs {base.family.name} on a CPU with yarn only"
            )
            self.problems.add(
                "model.path", problem, 'Type server.device=cuda, or give its config.json a rope_scaling of type "yarn".'
            )

    def check_clashes(self) -> None:
        """What does not go together is a mistake, what does not go well a warning."""
        base = self.facts.checkpoint
        if base is None or "kt.threadpool_count" not in self.resolved:
            return
        for clash, problem, fix in clashes(self._situation(base)):
            if clash.refused:
                self.problems.add(clash.key, problem, fix)
            else:
                self.warnings.append(f"{clash.key}: {problem}" + (f". {fix}" if fix else ""))

    def _situation(self, base: Checkpoint) -> Situation:
        host, adapters = self.facts.host, self.facts.adapters
        return Situation(
            method=self.value("kt.method"),
            threads=self.value("kt.cpuinfer"),
            pools=self.value("kt.threadpool_count"),
            nodes=len(host.nodes_in_use) or 1,
            hidden=base.hidden_size,
            intermediate=base.moe_intermediate_size,
            experts_bytes=base.expert_bytes,
            padding_percent=padding_percent(base),
            device=self.value("server.device"),
            attention_backend=self.value("server.attention_backend"),
            lora_backend=self.value("server.lora_backend"),
            instruction_set=host.instruction_set,
            amx_refused="amx_tile" in host.cpu_flags and not host.amx_permitted,
            places_memory=host.places_memory,
            disk=self.facts.disk.kind if self.facts.disk else "unknown",
            adapters=len(adapters),
            expert_lora=self.expert_lora,
            max_per_batch=self.value("lora.max_per_batch") if adapters else 0,
            flags=frozenset(word.partition("=")[0] for word in self.config.server.extra_args if word.startswith("--")),
        )

    def resolve_fit(self) -> None:
        """What the launch takes of each memory; refused, or with server.fit=warn told, where it does not fit."""
        base, host = self.facts.checkpoint, self.facts.host
        if base is None or "kt.threadpool_count" not in self.resolved:
            return
        demand = self._demand()
        fit = estimate(demand, base, host)
        if self.config.server.mem_fraction is None:
            fit = self._raise_fraction(demand, base, fit)
        self.set("fit", fit.needs, "derived: shapes, method, adapters and limits")
        self.set("fit.free", fit.free, "probed: available memory, cgroup limits")
        self.warnings += [f"kt.threadpool_count: {place}: {place.advice}" for place in fit.slow]
        if fit.short:
            self._tell_misfit(fit, nearest_fits(self._demand(), base, host))

    def _demand(self) -> Demand:
        adapters, device = self.facts.adapters, self.value("server.device")
        others = sum(count for each in adapters for place, count in each.places.items() if place != "routed expert")
        return Demand(
            method=self.value("kt.method"),
            pools=self.value("kt.threadpool_count"),
            device=device,
            context_length=self.value("server.context_length"),
            max_running_requests=self.value("server.max_running_requests"),
            max_total_tokens=self.value("server.max_total_tokens"),
            mem_fraction=self.value("server.mem_fraction"),
            max_rank=self.value("lora.max_rank") if adapters else 0,
            max_per_batch=self.value("lora.max_per_batch") if adapters else 0,
            expert_ranks=tuple(adapter.rank for adapter in adapters if adapter.reaches_experts),
            other_pairs=others,
            total_is_derived=device == "cpu" and self.config.server.max_total_tokens is None,
        )

    def _raise_fraction(self, demand: Demand, base: Checkpoint, fit: Fit) -> Fit:
        """A launch that fits with a larger share of memory for SGLang gets it, where nobody typed another."""
        for fraction in FRACTIONS:
            larger = estimate(replace(demand, mem_fraction=fraction), base, self.facts.host)
            if demand.mem_fraction is not None and fit.short and not larger.short:
                self.set("server.mem_fraction", fraction, f"derived: {demand.mem_fraction} leaves too little")
                return larger
        return fit

    def _tell_misfit(self, fit: Fit, changes: Sequence[str]) -> None:
        least = max(place.needed_bytes - place.free_bytes for place in fit.short)
        fix = f"Type {', or '.join(changes)}." if changes else f"No setting fits: {gib(least)} GiB more are needed."
        for place in fit.short:
            if self.config.server.fit == "warn":
                self.warnings.append(f"server.fit: {place}. {fix}")
            else:
                self.problems.add("server.fit", str(place), fix)

    def adapter_options(self) -> dict[str, str]:
        """What holds for adapters that the running server loads too."""
        lora = self.config.lora
        chosen = {"ignore": lora.ignore, "allow_missing": lora.allow_missing}
        return {"KT_LAUNCH_LORA_OPTIONS": json.dumps(chosen)} if any(chosen.values()) else {}

    def profiling(self) -> dict[str, str]:
        """Metrics tell where the experts' time goes, so their kernels have to count it."""
        return {"KT_LAUNCH_PROFILE": "1"} if self.config.server.metrics_port is not None else {}

    def packed_cache(self) -> dict[str, str]:
        """Only where it is not to be used."""
        return {"KT_LAUNCH_PACKED_CACHE": "off"} if self.value("kt.packed_cache") == "off" else {}

    def argv(self) -> tuple[str, ...]:
        """The server's command: what the plan sets, then what the user adds."""
        own = [
            *self._model_arguments(),
            *self._server_arguments(),
            *self._expert_arguments(),
            *self._adapter_arguments(),
        ]
        extra = self.config.server.extra_args
        for argument in extra:
            flag = argument.partition("=")[0]
            if flag.startswith("--") and flag in own:
                problem = f"{flag} is set by the plan"
                self.problems.add("server.extra_args", problem, "Use the key of the plan that sets it.")
        self.problems.raise_if_any()
        return (sys.executable, *SERVER_COMMAND, *own, *extra)

    def _model_arguments(self) -> list[str]:
        trust = ["--trust-remote-code"] if self.config.model.trust_remote_code else []
        return [
            "--model-path",
            self.value("model.path"),
            "--served-model-name",
            self.value("model.name"),
            "--dtype",
            "bfloat16",
            *trust,
        ]

    def _server_arguments(self) -> list[str]:
        words = []
        for key, flag in SERVER_FLAGS.items():
            value = self.value(key)
            if value is not None:
                words += [flag, str(value)]
        return [*words, *self.rules.arguments]

    def _expert_arguments(self) -> list[str]:
        return [word for key, flag in EXPERT_FLAGS.items() for word in (flag, str(self.value(key)))]

    def _adapter_arguments(self) -> list[str]:
        adapters = self.facts.adapters
        if not adapters:
            return []
        paths = [f"{adapter.name}={adapter.path}" for adapter in adapters]
        rank, batch = str(self.value("lora.max_rank")), str(self.value("lora.max_per_batch"))
        backend = self.value("server.lora_backend")
        words = ["--enable-lora", "--lora-paths", *paths, "--max-lora-rank", rank, "--max-loras-per-batch", batch]
        return [*words, "--lora-backend", backend]


SERVER_FLAGS = {
    "server.host": "--host",
    "server.port": "--port",
    "server.device": "--device",
    "server.attention_backend": "--attention-backend",
    "server.sampling_backend": "--sampling-backend",
    "server.context_length": "--context-length",
    "server.max_total_tokens": "--max-total-tokens",
    "server.max_running_requests": "--max-running-requests",
    "server.mem_fraction": "--mem-fraction-static",
}

EXPERT_FLAGS = {
    "kt.weight_path": "--kt-weight-path",
    "kt.method": "--kt-method",
    "kt.cpuinfer": "--kt-cpuinfer",
    "kt.threadpool_count": "--kt-threadpool-count",
    "kt.num_gpu_experts": "--kt-num-gpu-experts",
}


def usable_threads(host: Host) -> tuple[int, str]:
    """How many expert threads the machine is good for, and why."""
    cores = host.usable_cores or len(host.affinity) or 1
    bounds = [f"{cores} usable physical cores", f"affinity to {len(host.affinity)} CPUs"]
    threads = min(cores, len(host.affinity) or cores)
    if host.quota_cpus is not None:
        bounds.append(f"a cgroup quota of {host.quota_cpus:g} CPUs")
        threads = min(threads, max(1, math.floor(host.quota_cpus)))
    return threads, f"probed: {', '.join(bounds)}"


def usable_pools(host: Host, threads: int) -> int:
    """How many pools that many threads make on this machine: one a NUMA node in use."""
    return min(len(host.nodes_in_use) or 1, threads)


def pool_places(host: Host, threads: int, pools: int) -> list[dict[str, Any]]:
    """Node, threads and CPUs of each pool, as kt_kernels' ThreadPool deals them out. One pool runs on any CPU."""
    nodes = host.nodes_in_use
    bound = pools > 1 and len(nodes) > 1
    owners = [worker * pools // threads for worker in range(threads)]
    places = []
    for pool in range(pools):
        node = nodes[pool % len(nodes)] if bound else None
        cpus = node.cpus & host.affinity if node else host.affinity
        number = node.number if node else None
        places.append({"node": number, "threads": owners.count(pool), "cpus": show_cpu_list(cpus)})
    return places


def show_cpu_list(cpus: Iterable[int]) -> str:
    """The kernel's list format: 0-3,8,10-11."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and runs[-1][1] == cpu - 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def _most_threads(host: Host) -> int:
    """More threads than this only take time from each other."""
    most = len(host.affinity) or 1
    return most if host.quota_cpus is None else min(most, max(1, math.ceil(host.quota_cpus)))


def _describe_gpus(host: Host) -> str:
    if not host.gpus:
        return "no GPU"
    if not host.cuda_torch:
        return f"{host.gpus[0].name}, but the installed torch is a CPU build"
    return ", ".join(gpu.name for gpu in host.gpus)
