"""Where the product's own files are, in a checkout as in an installed wheel, and where run folders go."""

from __future__ import annotations

import os
from pathlib import Path

from kt_model.errors import LaunchError
from kt_model.user_paths import expanded

PACKAGE = Path(__file__).resolve().parent.parent
CHECKOUT = PACKAGE.parent.parent


def _shipped(name: str) -> Path:
    installed = PACKAGE / name
    return installed if installed.is_dir() else CHECKOUT / name


def conf_folder() -> Path:
    """The shipped configs."""
    return _shipped("conf")


def demo_folder(name: str) -> Path:
    """The shipped demo checkpoint (model) or adapter (west)."""
    return _shipped("demo") / name


def state_folder() -> Path:
    """The folder for what outlives a launch."""
    from platformdirs import user_state_dir

    return Path(user_state_dir("kt-launch", appauthor=False))


def runs_folder(given: str | None) -> Path:
    """The folder for run folders: the one given, else KT_LAUNCH_RUNS, else the user's state folder. Raises LaunchError
    if that is a file."""
    chosen = given or os.environ.get("KT_LAUNCH_RUNS")
    folder = expanded(chosen).absolute() if chosen else state_folder() / "runs"
    if folder.exists() and not folder.is_dir():
        where = "paths.runs" if given else "KT_LAUNCH_RUNS"
        raise LaunchError(
            where, f"{folder} is a file, but a folder for runs is expected", f"Set {where}=/path/to/folder."
        )
    return folder
