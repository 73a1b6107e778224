"""Atomic file writes and bounded reads, with disk errors in the user's words."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from kt_model.errors import LaunchError
from kt_model.user_paths import cache_root

MOST_BYTES = 32 << 20
"""Limit for a JSON file; the index of a model with a trillion parameters has half of that."""
PRIVATE, PUBLIC = 0o600, 0o666
"""File modes; the second is subject to the umask."""


@contextlib.contextmanager
def whole_file(path: Path, *, private: bool = False) -> Iterator[BinaryIO]:
    """The file gets its name, replacing an earlier one, when the block ends and everything is on disk. After an
    exception nothing remains of it; what a killed process has left is removed by the next write. `private`: readable by
    its owner only. Raises OSError."""
    draft = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with held_file(draft, PRIVATE if private else PUBLIC) as file:
            _remove_abandoned(path)
            yield file
            file.flush()
            os.fsync(file.fileno())
            draft.replace(path)
    except OSError as failure:  # a write error names no file, and the draft's name means nothing to users
        failure.filename = str(path) if failure.filename in (None, str(draft)) else failure.filename
        raise
    finally:
        draft.unlink(missing_ok=True)


def held_file(path: Path, mode: int) -> BinaryIO:
    """A new file, locked while it is open, so that other processes see that it is in use. Raises OSError."""
    while True:
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb")
        with contextlib.suppress(OSError):  # a disk without locks, where nobody removes others' drafts
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # another process took it for abandoned before it was locked


def _remove_abandoned(path: Path) -> None:
    """Abandoned drafts of the file, if the folder may be listed."""
    drafts = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{8}}\.tmp")
    with contextlib.suppress(OSError):
        for draft in filter(lambda each: drafts.fullmatch(each.name), path.parent.iterdir()):
            with contextlib.suppress(OSError), draft.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                draft.unlink()


def write_text(path: Path, text: str) -> None:
    """Atomically, as UTF-8; anything but a regular file (a terminal, a pipe) is simply written to. Raises OSError."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    with whole_file(path.resolve()) as file:
        file.write(text.encode())


def read_regular(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """A small file's content. Raises OSError for anything but a regular file (a pipe would block, a device never ends),
    and for one that exceeds the limit of its kind."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"is larger than {most_bytes >> 20} MiB", str(path))
    return content


def read_end(path: Path, most_bytes: int = MOST_BYTES) -> str:
    """The text of a file that may have grown for weeks, or its last part. Raises OSError, also for anything but a
    regular file."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    with path.open("rb") as file:
        left_out = max(0, os.fstat(file.fileno()).st_size - most_bytes)
        file.seek(left_out)
        content = file.read(most_bytes)
    return (content.partition(b"\n")[2] if left_out else content).decode("utf-8", "replace")


class DiskError(LaunchError):
    """The disk refused a write; what was written before is intact."""


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A full disk or an unwritable folder, in the user's words. Raises DiskError."""
    try:
        yield
    except OSError as failure:
        if failure.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "Free some space and run it again: it goes on where it stopped."
            raise DiskError(str(path), "the disk is full", fix) from failure
        cached = path.absolute().is_relative_to(cache_root())
        fix = f"{'Set KT_LAUNCH_CACHE to' if cached else 'Choose'} a folder that you can write."
        raise DiskError(str(path), f"cannot be written ({failure.strerror})", fix) from failure
