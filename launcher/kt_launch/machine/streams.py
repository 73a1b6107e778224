"""Standard output and error, of which the reader may be gone, the terminal closed, or the disk full: writing there ends
a command in order, and nothing is ever written in their place to a file that happens to have their number.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

GONE = (errno.EPIPE, errno.EIO)
"""A pipe that nobody reads, a terminal that was closed."""
OUT, ERR = 1, 2


class OutputGone(BaseException):
    """Whoever read what is printed here is gone. Like KeyboardInterrupt, nothing on the way takes it for a bug."""

    def __init__(self, terminal: bool) -> None:
        super().__init__(terminal)
        self.terminal = terminal


class Stream:
    """One of the two. A reader that is gone is told once, by OutputGone; from then on what is written is lost.

    lossy: what a full disk does not take is lost too, since what is running is worth more; otherwise OSError names it.
    """

    lossy = False

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._guarded():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._guarded():
            self._stream.flush()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as failure:
            if threading.current_thread() is not threading.main_thread():
                return  # what the main thread says next tells it
            if failure.errno in GONE:
                silence([self._stream.fileno()])
                raise OutputGone(failure.errno == errno.EIO) from None
            if not self.lossy:
                failure.filename = {OUT: "standard output", ERR: "standard error"}.get(self._stream.fileno(), "output")
                raise


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """sys.stdout and sys.stderr are such streams within the block."""
    before = sys.stdout, sys.stderr
    _open_missing()
    sys.stdout, sys.stderr = (cast(TextIO, Stream(each)) for each in (sys.stdout, sys.stderr))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def words_may_be_lost() -> Iterator[None]:
    """A full disk below the output ends nothing within the block."""
    Stream.lossy, before = True, Stream.lossy
    try:
        yield
    finally:
        Stream.lossy = before


def finish(stream: TextIO) -> None:
    """Write out what waits. Raises OSError where the disk is full, and OutputGone; Python would only say so in its last
    words."""
    try:
        stream.flush()
    except OSError:
        silence([stream.fileno()])
        raise


def silence(streams: Iterable[int]) -> None:
    """What is written to these file descriptors from now on is lost."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream)
    os.close(nowhere)


def _open_missing() -> None:
    """Streams that were closed before this process began: the next file that is opened would have their number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    sys.stdout = sys.stdout or os.fdopen(OUT, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(ERR, "w", closefd=False)
