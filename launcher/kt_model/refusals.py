"""What a machine may refuse at any moment (space on a disk, files, memory, processes), in the user's words: the last
resort of every command, where no other place knew more.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

from kt_model.errors import LaunchError
from kt_model.printable import printable

AGAIN = "Free some space and run it again."
OTHER_DISK = "Choose a folder on another disk."
WORDS: Mapping[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", AGAIN),
    errno.EDQUOT: ("your share of the disk is full", AGAIN),
    errno.EFBIG: ("may not grow so large (ulimit -f)", "Run ulimit -f unlimited before."),
    errno.EROFS: ("is on a disk that can only be read", OTHER_DISK),
    errno.EIO: ("its disk does not work (input/output error)", OTHER_DISK),
    errno.EMFILE: ("too many files are open", "Run ulimit -n 65536 before."),
    errno.ENFILE: ("too many files are open on this machine", "End other programs."),
    errno.EAGAIN: ("no more processes may be started", "Raise ulimit -u, or the container's limit of pids."),
    errno.ENOMEM: ("no memory is left", "End other programs, or lift the limit (ulimit -v)."),
}
"""Reason -> what is wrong, what to do. Anything else that the kernel says is a bug of ours until it is known better."""
NO_THREAD = "can't start new thread"
"""As Python says it."""


def told_refusal(failure: BaseException) -> LaunchError | None:
    """One line of it; None for every other exception."""
    number = failure.errno if isinstance(failure, OSError) else None
    if isinstance(failure, MemoryError):
        number = errno.ENOMEM
    elif isinstance(failure, RuntimeError) and NO_THREAD in str(failure):
        number = errno.EAGAIN
    if number is None or number not in WORDS:
        return None
    where = failure.filename if isinstance(failure, OSError) and isinstance(failure.filename, str) else "this machine"
    return LaunchError(printable(where), *WORDS[number])
