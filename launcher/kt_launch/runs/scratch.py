"""The folder for a server's temporary files. SGLang leaves its sockets behind; here they are removed with the folder.

A launcher that is killed leaves the folder, and its server's shared memory, whose names contain the number of the
start. The next start removes both, once no process uses them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from kt_launch.machine.host import user_name
from kt_launch.machine.processes import any_process_has
from kt_launch.machine.shared_memory import SHARED, remove_shared, shared_files_of
from kt_model.atomic_file import read_regular, whole_file
from kt_model.contract import START
from kt_model.errors import LaunchError

PREFIX = "kt-launch-"
OWNER = "owner"
"""A file in the folder, locked by the launcher while it lives; it holds the number of the server's start."""
SHARED_NAMES = "shared"
"""A file in the folder: paths of the server's shared memory that have other names, one per line."""
NUMBER = re.compile(r"[0-9a-f]{32}")
LONGEST_SOCKET = 107
"""The longest socket path that Linux accepts, in bytes."""
LONGEST_NAME = f"/{PREFIX}abcdefgh/tmpabcdefgh"
"""Of a socket in such a folder."""
SHORT = ("/tmp", "/var/tmp")
"""Used where the system's temporary folder has too long a path for sockets, as batch systems have it."""


@contextlib.contextmanager
def scratch_environment(start: str = "") -> Iterator[Mapping[str, str]]:
    """Variables that move a server's temporary files into a folder of its own. After the block the folder is removed,
    and so is all shared memory named after this start.

    torch's compiled code stays in its usual place, so that the next start can use it. Raises LaunchError if sockets
    could be created nowhere.
    """
    remove_abandoned()
    parent = _parents()[-1]
    if not _takes_sockets(parent):
        problem = f"{parent} is too long for the server's sockets, and there is no {' or '.join(SHORT)} to write into"
        raise LaunchError("TMPDIR", problem, "Set TMPDIR to a folder with a short path.")
    own_folder = tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent, ignore_cleanup_errors=True)
    with own_folder as folder, _owned(Path(folder), start):
        compiled = Path(tempfile.gettempdir()) / f"torchinductor_{user_name()}"
        yield {"TMPDIR": folder, "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(compiled))}


def _parents() -> list[str]:
    """The system's temporary folder; if sockets below it would have too long a path, also a short one to use
    instead."""
    usual = tempfile.gettempdir()
    others = [] if _takes_sockets(usual) else [each for each in SHORT if os.access(each, os.W_OK | os.X_OK)]
    return [usual, *others[:1]]


def _takes_sockets(parent: str) -> bool:
    return len(os.fsencode(parent + LONGEST_NAME)) <= LONGEST_SOCKET


def remove_abandoned() -> None:
    """Remove folders of this user whose launcher was killed and whose server has ended."""
    for folder in (found for parent in _parents() for found in Path(parent).glob(f"{PREFIX}*")):
        with contextlib.suppress(OSError):
            mine = folder.stat().st_uid == os.getuid()
            if mine and _owner_is_gone(folder) and not _is_used(folder, start := _start_of(folder)):
                remove_shared({*_noted(folder), *shared_files_of(start)})
                shutil.rmtree(folder)


def note_shared(environment: Mapping[str, str], files: Iterable[Path]) -> None:
    """Record files to remove together with the folder of this environment."""
    if folder := environment.get("TMPDIR"):
        with contextlib.suppress(OSError), whole_file(Path(folder, SHARED_NAMES)) as file:
            file.write("".join(f"{path}\n" for path in sorted(files)).encode())


def _noted(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        paths = map(Path, read_regular(folder / SHARED_NAMES).decode().splitlines())
        return [path for path in paths if path.parent == SHARED]
    return []


def _is_used(folder: Path, start: str) -> bool:
    """Whether a process of that start is alive."""
    return any_process_has("TMPDIR", str(folder)) or bool(start and any_process_has(START, start))


def _start_of(folder: Path) -> str:
    """'' if the file holds none. Only a number of our own form is accepted, since it becomes part of a path."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found = read_regular(folder / OWNER).decode()
        return found if NUMBER.fullmatch(found) else ""
    return ""


@contextlib.contextmanager
def _owned(folder: Path, start: str) -> Iterator[None]:
    """The file is written and locked before it gets its name, so that nobody finds it unlocked."""
    draft = folder / f"{OWNER}.tmp"
    with draft.open("wb", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):  # a full disk must not end the run
            file.write(start.encode())
        draft.rename(folder / OWNER)
        try:
            yield
        finally:
            remove_shared(shared_files_of(start))


def _owner_is_gone(folder: Path) -> bool:
    """Whether the lock is free; shared, so that two that look at once are not taken for the owner. A folder without
    the file is not ours, or is still being made."""
    try:
        with (folder / OWNER).open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
    except OSError:
        return False
