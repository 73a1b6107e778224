"""Where each value of the config came from, for the plan: command line, preset file, default."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kt_launch.config.dump import FILE_VARIABLE, hydra_override, leaves, read_values
from kt_launch.config.folder_presets import PACKAGES, as_folders, folders_in, key_of
from kt_model.errors import LaunchError

PACKAGE_HEADER = re.compile(r"#\s*@package\s+(\S+)")

QUOTED_OR_FLAG = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|(?<![^\[{,:])(True|False)(?![^\]},])""")
"""In a value as Hydra's sweepers write it: true and false have Python's names there."""


@dataclass(frozen=True)
class Sources:
    """Key -> the override that set it, and key -> the preset file that contains it."""

    command_line: Mapping[str, str] = field(default_factory=dict)
    presets: Mapping[str, str] = field(default_factory=dict)
    config_file: Mapping[str, str] = field(default_factory=dict)
    """Key -> the file that was given with --config."""
    typed: tuple[str, ...] = ()
    """All overrides, including choices of presets, as a person would type them."""

    def of(self, key: str) -> str:
        """In the plan's words."""
        for name in _with_parents(key):
            if name in self.config_file:
                return f"config file: {self.config_file[name]}"
            if name in self.command_line:
                return f"command line: {self.command_line[name]}"
        if key in self.presets:
            return f"preset file: {self.presets[key]}"
        return "default"

    def in_its_file(self, mistake: LaunchError) -> LaunchError:
        """The mistake, naming the preset file that contains the value."""
        source = self.of(mistake.where)
        if not source.startswith("preset file"):
            return self.in_config_file(mistake)
        return LaunchError(mistake.where, f"{mistake.problem} ({source})", mistake.fix)

    def in_config_file(self, mistake: LaunchError) -> LaunchError:
        """The same for the file of --config: a value that does not fit here was valid where the file was made."""
        source = self.of(mistake.where)
        if not source.startswith("config file") or source in mistake.problem or type(mistake) is not LaunchError:
            return mistake
        return LaunchError(mistake.where, f"{mistake.problem} ({source})", mistake.fix)


def _with_parents(key: str) -> Iterator[str]:
    while key:
        yield key
        key = key.rpartition(".")[0]


def read_sources(overrides: Sequence[str], choices: Mapping[str, Any], folders: list[Path], shipped: Path) -> Sources:
    """What was typed, and what each chosen preset file (first folder wins) sets."""
    typed, command_line = [], {}
    chosen: dict[str, Any] = {"": "config", **choices}
    for override in overrides:
        name, _, value = override.lstrip("+").partition("=")
        typed.append(as_typed(override))
        if not any((folder / name).is_dir() for folder in folders):
            command_line[name] = typed[-1]
        elif value.startswith("["):
            chosen[name] = [option.strip() for option in value.strip("[]").split(",")]
        for folder in folders_in(override) if name in PACKAGES else ():
            command_line[key_of(name, folder)] = typed[-1]
    presets: dict[str, str] = {}
    for group, options in chosen.items():
        for option in options if isinstance(options, list) else [options]:
            presets.update(_read_preset(group, str(option), folders, shipped))
    from_file = _from_file(overrides)
    return Sources(command_line, presets, from_file, tuple(typed))


def _from_file(overrides: Iterable[str]) -> dict[str, str]:
    """Keys whose last override comes from the file of --config."""
    file = os.environ.get(FILE_VARIABLE)
    if not file:
        return {}
    said = {hydra_override(key, value) for key, value in read_values(Path(file)).items()}
    last = {each.lstrip("+").partition("=")[0]: each for each in overrides}
    return {key: file for key, each in last.items() if each in said}


def as_typed(override: str) -> str:
    """An override in Hydra's grammar, as a person would type it."""
    name, _, value = override.lstrip("+").partition("=")
    return as_folders(f"{name}={_unquote(value)}")


def _unquote(value: str) -> str:
    value = QUOTED_OR_FLAG.sub(lambda found: found[1].lower() if found[1] else found[0], value)
    if len(value) >= 2 and value[0] == value[-1] == "'":
        return value[1:-1].replace("\\'", "'")
    return value


def _read_preset(group: str, option: str, folders: list[Path], shipped: Path) -> dict[str, str]:
    file = next((path for folder in folders if (path := folder / group / f"{option}.yaml").is_file()), None)
    if file is None or group.startswith("hydra"):
        return {}
    from kt_launch.config.presetfile import read_preset

    text, content = file.read_text(), read_preset(file)
    if not isinstance(content, dict):
        return {}
    label = file.relative_to(shipped.parent).as_posix() if file.is_relative_to(shipped) else str(file)
    keys = {
        key: label for key, _ in leaves(content, _package(text, group)) if not key.startswith(("defaults", "hydra"))
    }
    defaults = content.get("defaults") if group else None
    for entry in defaults if isinstance(defaults, list) else []:
        if isinstance(entry, str) and entry != "_self_":
            keys.update(_read_preset(group, entry, folders, shipped))
    return keys


def _package(text: str, group: str) -> str:
    match = PACKAGE_HEADER.search(text.partition("\n\n")[0])
    package = match[1] if match else group.replace("/", ".")
    return "" if package in ("_global_", "") else f"{package}."
