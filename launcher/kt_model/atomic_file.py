"""Files that are there whole or not at all, and what the disk refuses, in the user's words."""

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

MOST_BYTES = 32 << 20
"""Of a file of JSON; the index of a model of a trillion parameters has half of it."""
PRIVATE, PUBLIC = 0o600, 0o666
"""File modes; of the second the umask takes what it takes."""


@contextlib.contextmanager
def whole_file(path: Path, *, private: bool = False) -> Iterator[BinaryIO]:
    """Gets its name, in place of an earlier file, when the block is over and all of it is on the disk; left by an
    exception, nothing remains of it, and what a process that was killed has left goes with the next writing.
    `private`: readable by its owner only. Raises OSError."""
    draft = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with _held(draft, PRIVATE if private else PUBLIC) as file:
            _remove_abandoned(path)
            yield file
            file.flush()
            os.fsync(file.fileno())
            draft.replace(path)
    except OSError as failure:  # writing names no file, and the draft's name says nothing to people
        failure.filename = str(path) if failure.filename in (None, str(draft)) else failure.filename
        raise
    finally:
        draft.unlink(missing_ok=True)


def _held(draft: Path, mode: int) -> BinaryIO:
    """A new file, locked for as long as it is open: by that another process sees that somebody writes it."""
    while True:
        file = os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb")
        with contextlib.suppress(OSError):  # a disk without locks, on which nobody removes drafts of others
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # taken for abandoned before it was locked


def _remove_abandoned(path: Path) -> None:
    """Drafts of the file that nobody writes any more, in a folder that may be listed."""
    drafts = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{8}}\.tmp")
    with contextlib.suppress(OSError):
        for draft in filter(lambda each: drafts.fullmatch(each.name), path.parent.iterdir()):
            with contextlib.suppress(OSError), draft.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                draft.unlink()


def write_text(path: Path, text: str) -> None:
    """All or nothing, as UTF-8; what is no file (a terminal, a pipe) just gets it. Raises OSError."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    with whole_file(path.resolve()) as file:
        file.write(text.encode())


def read_regular(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """A small file's content. Raises OSError for what is no file (a pipe would be waited on, a device never ends) and
    for one that is larger than anything of its kind."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"is larger than {most_bytes >> 20} MiB", str(path))
    return content


def read_end(path: Path, most_bytes: int = MOST_BYTES) -> str:
    """The text of a file that may have grown for weeks, or its last lines. Raises OSError, for what is no file, too."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    with path.open("rb") as file:
        left_out = max(0, os.fstat(file.fileno()).st_size - most_bytes)
        file.seek(left_out)
        content = file.read(most_bytes)
    return (content.partition(b"\n")[2] if left_out else content).decode("utf-8", "replace")


class DiskError(LaunchError):
    """The disk did not take what was to be written; what it has taken is good."""


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A full disk or a folder that may not be written, in the user's words. Raises DiskError."""
    try:
        yield
    except OSError as failure:
        if failure.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "Free some space and run it again: it goes on where it stopped."
            raise DiskError(str(path), "the disk is full", fix) from failure
        fix = "Choose a folder that you can write."
        raise DiskError(str(path), f"cannot be written ({failure.strerror})", fix) from failure
