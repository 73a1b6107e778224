"""The plan of one launch: every value with its source, the command, the environment; and its file, which is all that
the server is given. planning/ finds the values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, model_validator

from kt_model.atomic_file import read_regular, whole_file
from kt_model.methods import short_name
from kt_model.printable import readable_json

ADAPTER_PATH = re.compile(r"lora\.(?P<name>.+)\.path")
FIT: Mapping[str, TypeAdapter[Any]] = {
    "fit": TypeAdapter(dict[str, dict[str, int]] | None),
    "fit.free": TypeAdapter(dict[str, int | None] | None),
}
"""Bytes that a launch needs of each memory, by part, and free bytes of each."""
SERVER_COMMAND = ("-P", "-m", "kt_sglang.server")


@dataclass(frozen=True)
class Resolved:
    """A value and its source."""

    value: Any
    source: str


class Item(BaseModel):
    """A resolved value in the plan's file."""

    value: Any
    source: str


class PlanFile(BaseModel):
    """The plan's file."""

    model_config = ConfigDict(strict=True)

    config: dict[str, Any]
    resolved: dict[str, Item]
    argv: list[str]
    env: dict[str, str]
    warnings: list[str]

    @model_validator(mode="after")
    def _fit_is_of_bytes(self) -> PlanFile:
        for key, kind in FIT.items():
            if key in self.resolved:
                kind.validate_python(self.resolved[key].value)
        return self


@dataclass(frozen=True)
class LaunchPlan:
    """Everything that a launch needs, and the record of it."""

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
        resolved = {key: {"value": item.value, "source": item.source} for key, item in self.resolved.items()}
        content = {
            "config": self.config,
            "resolved": resolved,
            "argv": list(self.argv),
            "env": dict(self.env),
            "warnings": list(self.warnings),
        }
        return readable_json(content, indent)

    @classmethod
    def from_json(cls, text: str) -> LaunchPlan:
        """Raises ValueError if the text is not a plan."""
        content = PlanFile.model_validate_json(text)
        resolved = {key: Resolved(item.value, item.source) for key, item in content.resolved.items()}
        _use_short_method(content.config, resolved)
        return cls(content.config, resolved, tuple(content.argv), content.env, tuple(content.warnings))

    @classmethod
    def read(cls, path: Path) -> LaunchPlan:
        return cls.from_json(read_regular(Path(path)).decode())

    def write(self, path: Path) -> None:
        """Atomically, readable by its owner only."""
        with whole_file(path, private=True) as file:
            file.write(f"{self.to_json()}\n".encode())


def _use_short_method(config: dict[str, Any], resolved: dict[str, Resolved]) -> None:
    """Plans recorded with AMXINT8_SFT and similar names are plans with int8."""
    if "kt.method" in resolved:
        item = resolved["kt.method"]
        resolved["kt.method"] = replace(item, value=short_name(item.value))
    if "method" in config.get("kt", {}):
        config["kt"]["method"] = short_name(config["kt"]["method"])


def served_ids(plan: LaunchPlan) -> list[str]:
    """The names that requests can use: the base model, then each adapter."""
    name = plan.value("model.name")
    return [name, *(f"{name}:{adapter}" for adapter in plan.adapters)]


def adapter_names(keys: Iterable[str]) -> list[str]:
    """Names of the adapters in a plan's keys, in order."""
    return [found["name"] for key in keys if (found := ADAPTER_PATH.fullmatch(key))]
