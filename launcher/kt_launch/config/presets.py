"""The folders that presets lie in, the user's first, and the groups and choices found there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from kt_launch.config.actions import ACTION, ACTIONS
from kt_launch.machine.folders import conf_folder
from kt_model.errors import LaunchError
from kt_model.user_paths import expanded


def config_folders(config_dir: str | None) -> list[Path]:
    """The user's folder, if there is one, and the shipped one."""
    given = config_dir or os.environ.get("KT_LAUNCH_CONFIG_DIR")
    if not given:
        return [conf_folder()]
    return [_validate_folder(given, "--config-dir" if config_dir else "KT_LAUNCH_CONFIG_DIR"), conf_folder()]


def read_groups(folders: Sequence[Path]) -> dict[str, list[str]]:
    """Every group with its choices."""
    found: dict[str, set[str]] = {ACTION: set(ACTIONS)}
    for folder in folders:
        for file in folder.glob("*/*.yaml"):
            found.setdefault(file.parent.name, set()).add(file.stem)
    return {name: sorted(found[name]) for name in sorted(found)}


def shown_options(options: Sequence[str]) -> list[str]:
    """The choices a person would type; with_<model> is chosen by the model."""
    return [option for option in options if not option.startswith("with_")]


def _validate_folder(folder: str, where: str) -> Path:
    path = expanded(folder).absolute()
    if not path.is_dir():
        raise LaunchError(where, f"no folder {path}", "Choose the folder that holds your model/, lora/, ... configs.")
    return path
