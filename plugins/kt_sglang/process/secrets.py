"""Secrets inside the server's processes: their values replace references (env:NAME) in SGLang's arguments, and never
reach a log. How they get into the environment: kt_model/redaction.py.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from kt_model.redaction import mask, secrets_of, show_arguments


def read_arguments(arguments: list[str]) -> list[str]:
    """SGLang's arguments with their secrets, which this process masks in all output from then on. Raises SystemExit
    naming a variable that is not set, or a file that cannot be read."""
    try:
        shown = show_arguments(arguments)
    except OSError as failure:
        raise SystemExit(f"kt_sglang: a key is said to be in {failure.filename}: {failure.strerror}") from failure
    except KeyError as missing:
        raise SystemExit(
            f"kt_sglang: an argument refers to the environment variable {missing.args[0]}, which is not set or empty"
        ) from missing
    hidden = {word.rpartition("=")[2] for word, given in zip(shown, arguments, strict=True) if word != given}
    for number, value in enumerate(sorted(hidden)):
        os.environ[f"KT_LAUNCH_HIDDEN_KEY_{number}"] = value  # for the processes that SGLang starts
    _hide(hidden)
    return shown


def hide_in_output() -> None:
    """From now on, this process writes *** instead of secrets (SGLang logs all its arguments)."""
    _hide(set(secrets_of()))


def _hide(secrets: set[str]) -> None:
    if secrets:
        found = sorted(secrets, key=len, reverse=True)
        sys.stdout, sys.stderr = _Masked(sys.stdout, found), _Masked(sys.stderr, found)


class _Masked:
    """A text stream that masks each text written to it."""

    def __init__(self, stream: Any, secrets: list[str]) -> None:
        self._stream = stream
        self._secrets = secrets

    def write(self, text: str) -> int:
        self._stream.write(mask(text, self._secrets))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
