"""The plan of one launch: every value with its source, the command, the environment; and its file, which is all that
the server is given. planning/ finds the values.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from kt_model.atomic_file import read_regular, whole_file
from kt_model.methods import short_name
from kt_model.printable import readable_json

ADAPTER_PATH = re.compile(r"lora\.(?P<name>.+)\.path")
FIT: Mapping[str, TypeAdapter[Any]] = {
    "fit": TypeAdapter(dict[str, dict[str, int]] | None),
    "fit.free": TypeAdapter(dict[str, int | None] | None),
}
"""Bytes that a launch needs of each memory, by part, and free bytes of each."""
HOST_MEMORY = "host memory"
"""Its name there; machine/host.py names the memory of a GPU."""
SERVER_COMMAND = ("-P", "-m", "kt_sglang.server")


@dataclass(frozen=True)
class Resolved:
    """A value and its source."""

    value: Any
    source: str


@dataclass(frozen=True)
class LaunchPlan:
    """Everything that a launch needs, and the record of it. Its file has the same fields."""

    config: Mapping[str, Any]
    """The validated config, before anything is resolved."""
    resolved: Mapping[str, Resolved]
    argv: tuple[str, ...]
    """The whole command."""
    env: Mapping[str, str]
    warnings: tuple[str, ...]

    def value(self, key: str) -> Any:
        return self.resolved[key].value

    @property
    def adapters(self) -> dict[str, str]:
        """Name -> folder of the adapters served, in the plan's order."""
        return {name: self.value(f"lora.{name}.path") for name in adapter_names(self.resolved)}

    def reaches_experts(self, adapter: str) -> bool:
        """Whether it changes routed experts. Plans of earlier versions have it in words alone."""
        counted = self.resolved.get(f"lora.{adapter}.expert_pairs")
        return counted.value > 0 if counted else "routed expert" in self.value(f"lora.{adapter}.reaches")

    @property
    def folder_names(self) -> dict[str, str]:
        """Folder -> its role in the launch: model, weights (of quantized experts) or `adapter west`."""
        names = {self.value("kt.weight_path"): "weights", self.value("model.path"): "model"}
        return names | {path: f"adapter {name}" for name, path in self.adapters.items()}

    def placed_in(self, folder: Path) -> LaunchPlan:
        """The same plan with its run folder."""
        placed = Resolved(str(folder), "derived: time and model name, below the runs' root")
        return replace(self, resolved={**self.resolved, "run.folder": placed})

    def to_json(self, indent: int | None = 2) -> str:
        return readable_json(asdict(self), indent)

    @classmethod
    def from_json(cls, text: str) -> LaunchPlan:
        """Raises ValueError if the text is not a plan."""
        plan = _file_of_plan().validate_json(text, strict=True)
        for key, kind in FIT.items():
            if key in plan.resolved:
                kind.validate_python(plan.value(key))
        return _with_short_method(plan)

    @classmethod
    def read(cls, path: Path) -> LaunchPlan:
        return cls.from_json(read_regular(Path(path)).decode())

    def write(self, path: Path) -> None:
        """Atomically, readable by its owner only."""
        with whole_file(path, private=True) as file:
            file.write(f"{self.to_json()}\n".encode())


@functools.cache
def _file_of_plan() -> TypeAdapter[LaunchPlan]:
    return TypeAdapter(LaunchPlan)


def _with_short_method(plan: LaunchPlan) -> LaunchPlan:
    """Plans recorded with AMXINT8_SFT and similar names are plans with int8."""
    config, resolved = dict(plan.config), dict(plan.resolved)
    if "kt.method" in resolved:
        resolved["kt.method"] = replace(resolved["kt.method"], value=short_name(plan.value("kt.method")))
    if "method" in config.get("kt", {}):
        config["kt"] = {**config["kt"], "method": short_name(config["kt"]["method"])}
    return replace(plan, config=config, resolved=resolved)


def served_ids(plan: LaunchPlan) -> list[str]:
    """The names that requests can use: the base model, then each adapter."""
    name = plan.value("model.name")
    return [name, *(f"{name}:{adapter}" for adapter in plan.adapters)]


def adapter_names(keys: Iterable[str]) -> list[str]:
    """Names of the adapters in a plan's keys, in order."""
    return [found["name"] for key in keys if (found := ADAPTER_PATH.fullmatch(key))]
