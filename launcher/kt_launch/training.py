"""A training run's folder as an adapter: which of its checkpoints is meant. Goes by names alone and opens no file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"
CHECKPOINT = re.compile(r"checkpoint-(\d{1,12})")
"""What Hugging Face's Trainer calls the folder of a step."""
FINAL = "final"


@dataclass(frozen=True)
class Training:
    """The checkpoints of one training run, by name, the newest first."""

    folder: Path
    whole: tuple[str, ...]
    """Those with an adapter_config.json, which PEFT writes last."""
    unfinished: tuple[str, ...]
    """Those without."""
    has_final: bool
    """Whether the folder holds an adapter of its own, which is what it means then."""

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
        """What was chosen by, and what else there is, in the words of a plan's source."""
        passed = [f"{name} has no {ADAPTER_CONFIG}" for name in self.unfinished]
        others = ", ".join(reversed(self.whole if self.has_final else self.whole[1:]))
        if self.has_final:
            found = f"{self.folder / ADAPTER_CONFIG}, before {others} below it"
        else:
            found = f"the highest step in {self.folder}, before {others}" if others else f"alone in {self.folder}"
        return "; ".join([f"probed: {found}", *passed])


def read_training(folder: Path) -> Training | None:
    """The training run that a folder holds; None where it has no checkpoints to choose from."""
    try:
        names = [entry.name for entry in folder.iterdir() if CHECKPOINT.fullmatch(entry.name) and entry.is_dir()]
    except OSError:
        return None
    names.sort(key=_step, reverse=True)
    whole = tuple(name for name in names if (folder / name / ADAPTER_CONFIG).is_file())
    unfinished = tuple(name for name in names if name not in whole)
    return Training(folder, whole, unfinished, (folder / ADAPTER_CONFIG).is_file()) if whole else None


def adapter_folder(folder: Path) -> Path:
    """The folder that an adapter is read from, where `folder` may be that of its training."""
    training = read_training(folder)
    return training.path if training else folder


def _step(name: str) -> int:
    return int(name.rpartition("-")[2])
