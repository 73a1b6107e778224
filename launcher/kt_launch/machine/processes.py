"""What a process of a bench does so that none of them outlives the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal
from types import FrameType

PR_SET_PDEATHSIG = 1


class Stopped(Exception):
    """SIGTERM or Ctrl-C reached this process: it ends what it started."""


def follow(parent: int) -> None:
    """SIGTERM for this process when `parent`, which started it, is gone, however it went."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def stop_on_signals() -> None:
    """Raise Stopped in the main thread at the first SIGTERM or SIGINT; later ones are ignored."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise Stopped

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)
