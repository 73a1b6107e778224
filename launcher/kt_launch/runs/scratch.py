"""The folder for a server's temporary files. SGLang leaves its sockets behind; here they are removed with the folder.

A launcher that is killed leaves the folder, and its server's shared memory (shared_record.py). The next start removes
both, once no process uses them, also if its own TMPDIR is another one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kt_launch.machine.host import user_name
from kt_launch.machine.processes import any_process_has
from kt_launch.machine.shared_memory import remove_shared
from kt_launch.runs.shared_record import (
    NUMBER,
    PREFIX,
    SharedRecord,
    is_alive,
    named_after,
    noted_folders,
    remove_abandoned_shared,
)
from kt_model.atomic_file import read_regular
from kt_model.errors import LaunchError

OWNER = "owner"
"""A file in the folder, locked by the launcher while it lives; it holds the number of the server's start."""
LONGEST_SOCKET = 107
"""The longest socket path that Linux accepts, in bytes."""
LONGEST_NAME = f"/{PREFIX}abcdefgh/tmpabcdefgh"
"""Of a socket in such a folder."""
SHORT = ("/tmp", "/var/tmp")
"""Used where the system's temporary folder has too long a path for sockets, as batch systems have it."""


@dataclass(frozen=True)
class Scratch:
    """A server's folder for temporary files, and the record of its shared memory."""

    environment: Mapping[str, str]
    """Variables that move its temporary files into the folder. torch's compiled code stays in its usual place, so that
    the next start can use it."""
    shared: SharedRecord


@contextlib.contextmanager
def scratch(start: str) -> Iterator[Scratch]:
    """A folder for a server of this number. After the block the folder is removed, and so is all shared memory of this
    start. Raises LaunchError if sockets could be created nowhere."""
    remove_abandoned()
    parent = _parents()[-1]
    if not _takes_sockets(parent):
        problem = f"{parent} is too long for the server's sockets, and there is no {' or '.join(SHORT)} to write into"
        raise LaunchError("TMPDIR", problem, "Set TMPDIR to a folder with a short path.")
    own_folder = tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent, ignore_cleanup_errors=True)
    with SharedRecord(start) as shared, own_folder as folder, _owned(Path(folder), start):
        shared.note_folder(Path(folder))
        compiled = Path(tempfile.gettempdir()) / f"torchinductor_{user_name()}"
        cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(compiled))
        yield Scratch({"TMPDIR": folder, "TORCHINDUCTOR_CACHE_DIR": cache}, shared)


def _parents() -> list[str]:
    """The system's temporary folder; if sockets below it would have too long a path, also a short one to use
    instead."""
    usual = tempfile.gettempdir()
    others = [] if _takes_sockets(usual) else [each for each in SHORT if os.access(each, os.W_OK | os.X_OK)]
    return [usual, *others[:1]]


def _takes_sockets(parent: str) -> bool:
    return len(os.fsencode(parent + LONGEST_NAME)) <= LONGEST_SOCKET


def remove_abandoned() -> None:
    """Remove what is left of this user's servers that have ended and whose launcher was killed: folders, and shared
    memory."""
    beside = (found for parent in _parents() for found in Path(parent).glob(f"{PREFIX}*"))
    for folder in {*beside, *noted_folders()}:
        with contextlib.suppress(OSError):
            mine = folder.stat().st_uid == os.getuid()
            if mine and _owner_is_gone(folder) and not _is_used(folder, start := _start_of(folder)):
                remove_shared(named_after(start))
                shutil.rmtree(folder)
    remove_abandoned_shared()


def _is_used(folder: Path, start: str) -> bool:
    """Whether a process of that start is alive."""
    return any_process_has("TMPDIR", str(folder)) or bool(start and is_alive(start))


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
        yield


def _owner_is_gone(folder: Path) -> bool:
    """Whether the lock is free; shared, so that two that look at once are not taken for the owner. A folder without
    the file is not ours, or is still being made."""
    try:
        with (folder / OWNER).open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
    except OSError:
        return False
