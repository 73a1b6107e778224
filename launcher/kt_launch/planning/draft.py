"""A plan in progress: the config, the facts, and what is resolved so far."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kt_launch.machine.allocation import HostPlace
from kt_model.adapter_capacity import EXPERT_MODULES
from kt_model.errors import Problems
from kt_model.plan import Resolved

if TYPE_CHECKING:
    from kt_launch.config.schema import Config
    from kt_launch.config.sources import Sources
    from kt_launch.machine.host import Disk, Host, Route
    from kt_launch.machine.ports import Port
    from kt_launch.planning.locate import AllowedFolders, LocatedFolder
    from kt_model.adapters import AdapterFacts
    from kt_model.checkpoint import Checkpoint
    from kt_model.expert_profile import ExpertProfile
    from kt_model.generation import Generation
    from kt_model.weights.locations import Experts
    from kt_model.weights.packed import CacheStatus


INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Variables that tell torch's process groups their network interface."""


@dataclass(frozen=True)
class Facts:
    """What was read before resolving; None for what could not be read, which has been reported by then."""

    host: Host
    port: Port
    model: LocatedFolder | None
    checkpoint: Checkpoint | None
    adapters: Sequence[AdapterFacts]
    adapter_folders: Mapping[str, LocatedFolder] = field(default_factory=dict)
    """Where each adapter was found, by name."""
    allowed: AllowedFolders | None = None
    """Folders that adapters may be loaded from later."""
    metrics_port: Port | None = None
    """None if no metrics are requested."""
    playground_port: Port | None = None
    """None if no playground is requested."""
    adapters_port: Port | None = None
    """None if no port for loading adapters into several servers is requested."""
    experts: Experts | None = None
    """The folder of quantized experts, if the method uses one."""
    disk: Disk | None = None
    """The disk that holds the checkpoint."""
    environ: Mapping[str, str] = field(default_factory=dict)
    """SGLang's own environment variables, which its server will read, and those of INTERFACE_VARIABLES."""
    place: HostPlace = field(default_factory=HostPlace)
    """This host among several, as a batch system or Kubernetes sets it."""
    route: Route | None = None
    """The network route to host 0, if there are several hosts."""
    packed: CacheStatus | None = None
    """What the start will find in the packed cache; None if the cache is off or the experts are unknown."""
    expert_profile: ExpertProfile | None = None
    """The profile named by kt.expert_profile."""
    generation: Generation | None = None
    """What the checkpoint's folder says of its answers; None if it could not be read."""
    router: bool = True
    """Whether sglang-router is installed; only checked if there are replicas."""
    transformers: bool = False
    """Whether transformers is installed, checked without importing it."""


class Draft:
    """The resolved values, by key. The files of this folder read config and facts, and write here."""

    def __init__(self, config: Config, facts: Facts, sources: Sources, problems: Problems) -> None:
        self.config = config
        self.facts = facts
        self.sources = sources
        self.problems = problems
        self.resolved: dict[str, Resolved] = {}
        self.warnings: list[str] = []

    @property
    def has_lora(self) -> bool:
        """Whether the server has adapters, or capacity for them."""
        return bool(self.facts.adapters) or self.config.lora.wants_capacity

    @property
    def expert_lora(self) -> bool:
        """Whether adapters change routed experts, or may be loaded later that do."""
        if any(adapter.reaches_experts for adapter in self.facts.adapters):
            return True
        capacity = self.resolved.get("lora.target_modules")
        return capacity is not None and self.config.lora.wants_capacity and {*EXPERT_MODULES} <= {*capacity.value}

    def set(self, key: str, value: Any, source: str) -> None:
        self.resolved[key] = Resolved(value, source)

    def value(self, key: str) -> Any:
        return self.resolved[key].value

    def given(self, key: str) -> Any:
        """The config's value of a key."""
        return functools.reduce(getattr, key.split("."), self.config)

    def keep(self, key: str) -> Any:
        """Set a key as it is in the config, and return it."""
        self.set(key, self.given(key), self.sources.of(key))
        return self.value(key)

    def keep_or(self, key: str, value: Any, source: str) -> Any:
        """The same if the config has a value; otherwise this value, where None leaves the choice to SGLang."""
        if self.given(key) is not None:
            return self.keep(key)
        self.set(key, value, source if value is not None else "default: SGLang chooses")
        return value
