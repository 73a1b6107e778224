"""Makes text of unknown origin (names, paths, log lines) safe for a terminal."""

from __future__ import annotations

import json
from typing import Any, TextIO

KEPT = "\n\t"
"""The non-printable characters of a text of several lines."""


def printable(text: str, kept: str = "") -> str:
    """Escapes each character that moves the cursor, begins a line, changes the text direction or is not a valid
    character: control characters, ANSI sequences, bidirectional marks, lone surrogates. Those in `kept` are left
    alone."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in kept else each.encode("unicode_escape").decode() for each in text
    )


def readable_json(content: Any, indent: int | None) -> str:
    """JSON with letters of every language unescaped, unless the text contains something unprintable."""
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    return text if printable(text, KEPT) == text else json.dumps(content, indent=indent)


def say(text: str, *, file: TextIO | None = None, kept: str = "") -> None:
    """Print a line with text of unknown origin immediately, to stdout unless a file is given. kept: characters not
    escaped, in addition to leading newlines."""
    line = text.lstrip("\n")
    print(text[: len(text) - len(line)] + printable(line, kept), file=file, flush=True)
