"""Resolves a training run's folder to one of its checkpoints. Uses names alone and opens no file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kt_model.errors import LaunchError, quoted

ADAPTER_CONFIG = "adapter_config.json"
CHECKPOINT = re.compile(r"checkpoint-(\d{1,12})")
"""The Hugging Face Trainer's name for the folder of a step."""
FINAL = "final"


@dataclass(frozen=True)
class Training:
    """The checkpoints of one training run, by name, newest first."""

    folder: Path
    whole: tuple[str, ...]
    """Those with an adapter_config.json, which PEFT writes last."""
    unfinished: tuple[str, ...]
    """Those without."""
    has_final: bool
    """Whether the folder itself holds an adapter, which is then the one used."""

    @property
    def path(self) -> Path:
        """The folder that the adapter is read from."""
        return self.folder if self.has_final else self.folder / self.whole[0]

    @property
    def chosen(self) -> str:
        """The checkpoint's name, or that it is the final adapter."""
        return FINAL if self.has_final else self.whole[0]

    @property
    def why(self) -> str:
        """The reason for the choice, and the alternatives, in the words of a plan's source."""
        passed = [f"{name} has no {ADAPTER_CONFIG}" for name in self.unfinished]
        others = ", ".join(reversed(self.whole if self.has_final else self.whole[1:]))
        if self.has_final:
            found = f"{self.folder / ADAPTER_CONFIG}, before {others} below it"
        else:
            found = f"the highest step in {self.folder}, before {others}" if others else f"alone in {self.folder}"
        return "; ".join([f"probed: {found}", *passed])


def read_training(folder: Path) -> Training | None:
    """The training run in a folder; None if it has no checkpoints to choose from."""
    names = sorted(filter(CHECKPOINT.fullmatch, folders_in(folder)), key=_step, reverse=True)
    whole = tuple(name for name in names if _has_config(folder / name))
    unfinished = tuple(name for name in names if name not in whole)
    return Training(folder, whole, unfinished, _has_config(folder)) if whole else None


def adapter_folder(folder: Path) -> Path:
    """The folder that an adapter is read from; `folder` may be that of its training run."""
    training = read_training(folder)
    return training.path if training else folder


def require_adapter(folder: Path, where: str) -> None:
    """Raise LaunchError if there is no adapter_config.json, naming subfolders that have one."""
    if _has_config(folder):
        return
    inside = folders_in(folder)
    if near := [name for name in inside if _has_config(adapter_folder(folder / name))]:
        others = f" (there are also {', '.join(near[1:])})" if near[1:] else ""
        fix = f"Set {quoted(f'{where}={folder / near[0]}')}{others}."
    elif unfinished := [name for name in inside if CHECKPOINT.fullmatch(name)]:
        fix = f"Its {', '.join(unfinished)} has none either: save the adapter with PEFT's save_pretrained."
    elif (folder / "config.json").is_file():
        fix = f"It is a checkpoint: set {quoted(f'model={folder}')}, and {where} to the adapter's folder."
    else:
        fix = "Choose a folder that has one."
    raise LaunchError(where, f"{folder} has no {ADAPTER_CONFIG}", fix)


def folders_in(folder: Path) -> list[str]:
    """Names; empty for a folder that cannot be read."""
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    except OSError:
        return []


def _has_config(folder: Path) -> bool:
    """Also False for a folder that cannot be read."""
    try:
        return (folder / ADAPTER_CONFIG).is_file()
    except OSError:
        return False


def _step(name: str) -> int:
    return int(name.rpartition("-")[2])
