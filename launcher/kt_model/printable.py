"""Makes text of unknown origin (names, paths, log lines) safe for a terminal."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from typing import Any, TextIO

KEPT = "\n\t"
"""The non-printable characters of a text of several lines."""
PROSE = re.compile(r"proof: ")
"""The label of lines that are sentences, without a command to copy."""


def printable(text: str, kept: str = "") -> str:
    """Escapes each character that moves the cursor, begins a line, changes the text direction or is not a valid
    character: control characters, ANSI sequences, bidirectional marks, lone surrogates. Those in `kept` are left
    alone."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in kept else each.encode("unicode_escape").decode() for each in text
    )


def is_utf8(text: str) -> bool:
    """Whether the name of a file can be written into another one, or sent; Python takes names of any bytes."""
    return not any("\udc80" <= each <= "\udcff" for each in text)


def under_label(line: str, file: TextIO) -> str:
    """A line such as `proof: …`: on a terminal wrapped between words, below its label; for a pipe as it is."""
    label = PROSE.match(line)
    if not label or not file.isatty():
        return line
    width, end = shutil.get_terminal_size().columns, "\n" if line.endswith("\n") else ""
    indent = " " * len(label[0])
    folded = textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(folded) + end


def readable_json(content: Any, indent: int | None) -> str:
    """JSON with letters of every language unescaped, unless the text contains something unprintable."""
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    return text if printable(text, KEPT) == text else json.dumps(content, indent=indent)


def say(text: str, *, file: TextIO | None = None, kept: str = "") -> None:
    """Print a line with text of unknown origin immediately, to stdout unless a file is given. kept: characters not
    escaped, in addition to leading newlines."""
    line = text.lstrip("\n")
    print(text[: len(text) - len(line)] + printable(line, kept), file=file, flush=True)
