"""The chat as somebody at a terminal of 80 columns has it: what is shown is waited for, keys are typed."""

from __future__ import annotations

import codecs
import contextlib
import os
import pty
import re
import select
import subprocess
import time

from launching import KT_LAUNCH, LONG_S

CODE, CODE_BEGUN = re.compile(r"\033\[[0-9;?]*[A-Za-z]"), re.compile(r"\033(\[[0-9;?]*)?$")
"""Of the terminal; it may come in two pieces."""


class Terminal:
    """`kt-launch chat` with these words, below a terminal of its own."""

    def __init__(self, *words: str) -> None:
        self.screen, terminal = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
        command = ["setsid", "--ctty", "--wait", str(KT_LAUNCH), "chat", *words]
        self.process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=env)
        os.close(terminal)
        self.shown, self._begun = "", ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def wait_for(self, pattern: str, timeout_s: float = LONG_S) -> str:
        """What was shown up to the pattern, without the terminal's own codes; it is taken off."""
        deadline = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < deadline, self.shown
            if select.select([self.screen], [], [], 0.5)[0]:
                self._begun += self._decoder.decode(os.read(self.screen, 65536))
                begun = CODE_BEGUN.search(self._begun)
                end = begun.start() if begun else len(self._begun)
                self.shown += CODE.sub("", self._begun[:end])
                self._begun = self._begun[end:]
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def interrupt(self, pattern: str) -> str:
        """Ctrl-C until the pattern is shown: one that comes after a prompt was written, but before readline waits for
        keys, is heard with the next key."""
        for _ in range(10):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return self.wait_for(pattern, 6)
        raise AssertionError(self.shown)

    def close(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()
        os.close(self.screen)
