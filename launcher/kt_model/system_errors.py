"""Errors of the operating system that may occur at any moment (disk space, files, memory, processes), in the user's
words: every command's last resort, if no more specific code has handled them.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Mapping
from pathlib import Path

from kt_model.errors import LaunchError
from kt_model.printable import printable

AGAIN = "Free some space and run it again."
OTHER_DISK = "Choose a folder on another disk."
WORDS: Mapping[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", AGAIN),
    errno.EDQUOT: ("your share of the disk is full", AGAIN),
    errno.EFBIG: ("may not grow so large (ulimit -f)", "Run ulimit -f unlimited first."),
    errno.EROFS: ("is on a read-only disk", OTHER_DISK),
    errno.EIO: ("its disk does not work (input/output error)", OTHER_DISK),
    errno.EMFILE: ("too many files are open", "Run ulimit -n 65536 first."),
    errno.ENFILE: ("too many files are open on this machine", "End other programs."),
    errno.EAGAIN: ("no more processes may be started", "Raise ulimit -u, or the container's limit of pids."),
    errno.ENOMEM: ("no memory is left", "End other programs, or lift the limit (ulimit -v)."),
}
"""errno -> what is wrong, what to do. Any other error of the kernel counts as a bug of ours."""
OF_A_FILE: Mapping[int, tuple[str, str]] = {
    errno.EISDIR: ("is a folder, and a file is expected", "Remove it, or choose another place."),
    errno.ENOTDIR: ("is a file, and a folder is expected", "Remove it, or choose another place."),
    errno.EACCES: ("is not yours to read or to write", "Choose another place, or have its rights changed."),
    errno.EPERM: ("is not yours to read or to write", "Choose another place, or have its rights changed."),
    errno.ENAMETOOLONG: ("has a longer name than its disk allows", "Choose a shorter one."),
    errno.ELOOP: ("is a symbolic link to itself", "Remove it, or choose another place."),
}
"""The same, if the error names a file."""
NO_THREAD = "can't start new thread"
"""In Python's words."""


@contextlib.contextmanager
def in_users_words() -> Iterator[None]:
    """Within the block such an error becomes a LaunchError."""
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as failure:
        known = launch_error_of(failure)
        if known is None:
            raise
        raise known from failure


def launch_error_of(failure: BaseException) -> LaunchError | None:
    """The error in one line; None for every other exception."""
    number = failure.errno if isinstance(failure, OSError) else None
    if isinstance(failure, MemoryError):
        number = errno.ENOMEM
    elif isinstance(failure, RuntimeError) and NO_THREAD in str(failure):
        number = errno.EAGAIN
    named = failure.filename if isinstance(failure, OSError) and isinstance(failure.filename, str | Path) else None
    words = {**WORDS, **(OF_A_FILE if named else {})}
    if number is None or number not in words:
        return None
    return LaunchError(printable(str(named or "this machine")), *words[number])
