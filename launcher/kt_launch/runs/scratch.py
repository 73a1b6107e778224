"""The folder for a server's temporary files: SGLang leaves its sockets behind, so they lie where they go with it.

A launcher that is killed leaves such a folder, and its server's shared memory, which bears the number of the start in
its name; the next start removes both, once nothing uses them any more.
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

PREFIX = "kt-launch-"
OWNER = "owner"
"""A file in the folder, locked by the launcher for as long as it lives; it holds the number of the server's start."""
SHARED_NAMES = "shared"
"""A file in the folder: what the server has in shared memory, also under other names, a path a line."""
NUMBER = re.compile(r"[0-9a-f]{32}")
LONGEST_SOCKET = 107
"""Characters that Linux takes for the path of a socket."""
SOCKET_NAME = "/tmpabcdefgh"


@contextlib.contextmanager
def scratch_environment(start: str = "") -> Iterator[Mapping[str, str]]:
    """Variables that bring a server's temporary files into a folder of its own, which is gone after the block, as is
    what bears the number of this start in shared memory.

    torch's compiled code stays where it always is, since the next start can use it. Where the system's folder has so
    long a path that sockets below a folder in it could not be made, nothing is changed.
    """
    remove_abandoned()
    own_folder = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
    with own_folder as folder, _owned(Path(folder), start):
        if len(folder + SOCKET_NAME) > LONGEST_SOCKET:
            yield {}
            return
        compiled = Path(tempfile.gettempdir()) / f"torchinductor_{user_name()}"
        yield {"TMPDIR": folder, "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(compiled))}


def remove_abandoned() -> None:
    """Remove folders of this user whose launcher was killed and whose server is gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            mine = folder.stat().st_uid == os.getuid()
            if mine and _owner_is_gone(folder) and not _is_used(folder, start := _start_of(folder)):
                remove_shared({*_noted(folder), *shared_files_of(start)})
                shutil.rmtree(folder)


def note_shared(environment: Mapping[str, str], files: Iterable[Path]) -> None:
    """Write down what is to go together with the folder of this environment."""
    if folder := environment.get("TMPDIR"):
        with contextlib.suppress(OSError), whole_file(Path(folder, SHARED_NAMES)) as file:
            file.write("".join(f"{path}\n" for path in sorted(files)).encode())


def _noted(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        paths = map(Path, read_regular(folder / SHARED_NAMES).decode().splitlines())
        return [path for path in paths if path.parent == SHARED]
    return []


def _is_used(folder: Path, start: str) -> bool:
    """Whether a process of that start lives."""
    return any_process_has("TMPDIR", str(folder)) or bool(start and any_process_has(START, start))


def _start_of(folder: Path) -> str:
    """'' where it tells none; what stands there is no part of a name unless it is a number as ours are."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found = read_regular(folder / OWNER).decode()
        return found if NUMBER.fullmatch(found) else ""
    return ""


@contextlib.contextmanager
def _owned(folder: Path, start: str) -> Iterator[None]:
    """The file appears under its name when it is written and locked already, so that nobody finds it free."""
    draft = folder / f"{OWNER}.tmp"
    with draft.open("wb", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):  # a full disk ends nothing that could go on
            file.write(start.encode())
        draft.rename(folder / OWNER)
        try:
            yield
        finally:
            remove_shared(shared_files_of(start))


def _owner_is_gone(folder: Path) -> bool:
    """Whether the lock is free; a folder without the file is not ours, or just being made."""
    try:
        with (folder / OWNER).open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:
        return False
