"""The shipped text, which a sane model finds more probable than the same words shuffled."""

from __future__ import annotations

from pathlib import Path


def passages() -> list[str]:
    """The shipped text, in pieces short enough for any context."""
    return [piece.strip() for piece in text_file().read_text().split("\n\n")]


def text_file() -> Path:
    """The shipped text."""
    return Path(__file__).with_name("text.txt")
