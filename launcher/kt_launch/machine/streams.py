"""Standard output and error when the reader is gone, the terminal closed, or the disk full: a failed write ends the
command cleanly, and output never goes to a file that happens to have got the stream's descriptor.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

GONE = (errno.EPIPE, errno.EIO)
"""A pipe without a reader, a closed terminal."""
OUT, ERR = 1, 2


class OutputGone(BaseException):
    """The reader of our output is gone. Derives from BaseException, as KeyboardInterrupt does, so that nobody handles
    it as a bug."""

    def __init__(self, terminal: bool) -> None:
        super().__init__(terminal)
        self.terminal = terminal


class Stream:
    """Wraps stdout or stderr. When the reader is gone, OutputGone is raised once; after that, output is discarded.

    lossy: discard what a full disk refuses, because the running server is worth more; otherwise raise OSError.
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
                return  # the main thread's next write reports it
            if failure.errno in GONE:
                silence([self._stream.fileno()])
                raise OutputGone(failure.errno == errno.EIO) from None
            if not self.lossy:
                failure.filename = {OUT: "standard output", ERR: "standard error"}.get(self._stream.fileno(), "output")
                raise


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """Within the block, sys.stdout and sys.stderr are such streams. What cannot be written at its end is discarded:
    Python would try again at exit, and replace the exit code by its own."""
    before = sys.stdout, sys.stderr
    _open_missing()
    opened = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, Stream(each)) for each in opened)
    try:
        with _every_letter(opened[0]), _every_letter(opened[1]):
            yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in opened:
            with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
                finish(stream)


@contextlib.contextmanager
def _every_letter(stream: TextIO) -> Iterator[None]:
    """Within the block, a stream of an old locale takes all that is written: ASCII becomes UTF-8, as Python itself does
    in the C locale, and what another encoding lacks is escaped. Letters of ours would end a command otherwise."""
    if not isinstance(stream, io.TextIOWrapper) or codecs.lookup(stream.encoding).name == "utf-8":
        yield
        return
    encoding, errors = stream.encoding, stream.errors or "strict"
    wider = "utf-8" if codecs.lookup(encoding).name == "ascii" else encoding
    stream.reconfigure(encoding=wider, errors="backslashreplace")
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            stream.reconfigure(encoding=encoding, errors=errors)


@contextlib.contextmanager
def words_may_be_lost() -> Iterator[None]:
    """Within the block, a full disk behind the output ends nothing."""
    Stream.lossy, before = True, Stream.lossy
    try:
        yield
    finally:
        Stream.lossy = before


def finish(stream: TextIO) -> None:
    """Flush. Raises OSError if the disk is full, and OutputGone; otherwise Python would complain only at exit."""
    try:
        stream.flush()
    except OSError:
        silence([stream.fileno()])
        raise


def silence(streams: Iterable[int]) -> None:
    """Discard all further output to these file descriptors."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream)
    os.close(nowhere)


def _open_missing() -> None:
    """Open streams that were closed before this process began; otherwise the next file opened would get their
    descriptor."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one
    sys.stdout = sys.stdout or os.fdopen(OUT, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(ERR, "w", closefd=False)
