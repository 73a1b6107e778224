"""Where the product's own files are, in a checkout as in an installed wheel, and where run folders go."""

from __future__ import annotations

import os
from pathlib import Path

from kt_model.errors import LaunchError, Problems
from kt_model.printable import is_utf8, printable
from kt_model.user_paths import expanded

PACKAGE = Path(__file__).resolve().parent.parent
CHECKOUT = PACKAGE.parent.parent
RUNS, CACHE = "KT_LAUNCH_RUNS", "KT_LAUNCH_CACHE"
LONGEST_NAME = 255
"""Longest file name in bytes on Linux file systems."""


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
    if that cannot be a folder."""
    where, chosen = _chosen_runs(given)
    return require_possible(chosen, where) if chosen else state_folder() / "runs"


def check_own_folders(runs: str | None, problems: Problems) -> None:
    """Adds a problem for each typed folder (runs, cache) that cannot be a folder; neither has to exist yet."""
    for where, chosen in (_chosen_runs(runs), (CACHE, os.environ.get(CACHE))):
        if chosen:
            with problems.collect():
                require_possible(chosen, where)


def _chosen_runs(given: str | None) -> tuple[str, str | None]:
    return ("paths.runs", given) if given else (RUNS, os.environ.get(RUNS))


def require_possible(text: str, where: str) -> Path:
    """The folder as an absolute path; it does not have to exist yet. Raises LaunchError if it cannot be a folder.

    Whether this user may write there is checked when something is written.
    """
    folder = expanded(text).absolute()
    if text.startswith("~") and expanded(text) == Path(text):
        problem = f"{printable(text)} names the home of an unknown user"
    else:
        problem = _impossible(folder)
    if problem:
        raise LaunchError(where, problem, f"Set {where}=/path/to/folder.")
    return folder


def _impossible(folder: Path) -> str:
    """Why the path cannot be a folder; '' if it can."""
    there = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    shown, at = printable(str(folder)), printable(str(there))
    try:
        is_folder, exists = there.is_dir(), there.exists()
    except PermissionError:  # of what a link leads to
        return f"this user may not read {at}"
    if not is_folder:
        what = "a file, but a folder is expected" if exists else "a broken link"
        return f"{shown} is {what}" if there == folder else f"{shown} cannot be made, since {at} is {what}"
    if not os.access(there, (os.R_OK if there == folder else 0) | os.X_OK):
        return f"this user may not read {at}"
    if not is_utf8(str(folder)):
        return f"the name of {shown} is not UTF-8"
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in folder.parts):
        return f"a name in {shown} has more than {LONGEST_NAME} bytes"
    return ""
