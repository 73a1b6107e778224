"""Text of unknown origin (names, paths, lines of logs) as a terminal may get it."""

from __future__ import annotations

import json
from typing import Any, TextIO

KEPT = "\n\t"
"""Of characters that are not printable, what a text of several lines has."""


def printable(text: str, kept: str = "") -> str:
    """Each character that moves a cursor, begins a line, turns text around or is no character by itself as its escape:
    control characters, ANSI sequences, bidirectional marks, lone surrogates. `kept` are left alone."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in kept else _escape(each) for each in text)


def readable_json(content: Any, indent: int | None) -> str:
    """Letters of every language as they are, unless something in it is no letter."""
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    return text if printable(text, KEPT) == text else json.dumps(content, indent=indent)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def say(text: str, *, file: TextIO | None = None, kept: str = "") -> None:
    """Print a line with text of unknown origin at once, to stdout unless a file is given; kept: what is let through,
    besides the empty lines that it begins with."""
    line = text.lstrip("\n")
    print(text[: len(text) - len(line)] + printable(line, kept), file=file, flush=True)
