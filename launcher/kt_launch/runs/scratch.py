"""The folder for a server's temporary files: SGLang leaves its sockets behind, so they lie where they go with it.

A launcher that is killed leaves such a folder, and its server's shared memory; the next start removes both, once
nothing uses them any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from kt_launch.machine.host import user_name
from kt_launch.machine.processes import any_process_has
from kt_launch.machine.shared_memory import SHARED, remove_shared
from kt_model.wholefile import read_regular, whole_file

PREFIX = "kt-launch-"
OWNER = "owner"
"""A file in the folder, locked by the launcher for as long as it lives."""
SHARED_NAMES = "shared"
"""A file in the folder: what the server has in shared memory, a path a line."""
LONGEST_SOCKET = 107
"""Characters that Linux takes for the path of a socket."""
SOCKET_NAME = "/tmpabcdefgh"


@contextlib.contextmanager
def scratch_environment() -> Iterator[Mapping[str, str]]:
    """Variables that bring a server's temporary files into a folder of its own, which is gone after the block.

    torch's compiled code stays where it always is, since the next start can use it. Where the system's folder has so
    long a path that sockets below a folder in it could not be made, nothing is changed.
    """
    remove_abandoned()
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as folder, _owned(Path(folder)):
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
            if mine and _owner_is_gone(folder) and not any_process_has("TMPDIR", str(folder)):
                remove_shared(_noted(folder))
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


@contextlib.contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """The file appears under its name when it is locked already, so that nobody finds it free."""
    draft = folder / f"{OWNER}.tmp"
    with draft.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        draft.rename(folder / OWNER)
        yield


def _owner_is_gone(folder: Path) -> bool:
    """Whether the lock is free; a folder without the file is not ours, or just being made."""
    try:
        with (folder / OWNER).open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:
        return False
