"""Python reads this at its start where its folder is on PYTHONPATH: the process then writes down the moments at which
it could die, or ends itself by SIGKILL at one of them, as if somebody had. What KT_CHAOS_DYING says, dying.py writes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

IMPORTS, READING, WRITING, RENAMING = "imports", "reading", "writing", "renaming"
EVENTS = {
    "import": IMPORTS,
    "open": READING,
    "os.mkdir": WRITING,
    "os.remove": WRITING,
    "os.rmdir": WRITING,
    "os.truncate": WRITING,
    "os.utime": WRITING,
    "os.rename": RENAMING,
}
"""Of sys.audit: each comes just before the thing itself."""
ASKED = json.loads(os.environ.get("KT_CHAOS_DYING", "{}"))


class Moments:
    """below: only what happens to files in this folder counts, besides imports. log: every kind of moment is written
    there; else the process dies at the number-th of a kind, if nobody has taken the file `armed` away before."""

    def __init__(self, below: str, log: str = "", kind: str = "", number: int = 0, armed: str = "") -> None:
        self._below, self._kind, self._left, self._armed = below, kind, number, armed
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if log else None

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        kind = EVENTS.get(event)
        if kind is None or (kind != IMPORTS and not self._is_below(arguments[0])):
            return
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            kind = WRITING
        if self._log is not None:
            os.write(self._log, f"{os.getpid()} {kind}\n".encode())
        elif kind == self._kind and self._left:
            self._left -= 1
            if not self._left:
                self._die()

    def _is_below(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self._below)

    def _die(self) -> None:
        try:
            Path(self._armed).unlink()
        except OSError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


if ASKED:
    sys.addaudithook(Moments(**ASKED))
