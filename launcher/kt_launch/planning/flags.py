"""How SGLang's parser reads words such as server.extra_args: it accepts a prefix of a flag as the flag."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

LEAST = len("--d")
"""Shorter prefixes match many flags, and the parser itself refuses them."""


def flags_in(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each word as if it were a flag, with its value: what follows its =, else the next word."""
    for word, following in zip(words, [*words, ""][1:], strict=True):
        flag, joined, value = word.partition("=")
        yield flag, value if joined else following


def is_flag(word: str, flag: str) -> bool:
    """Whether `word`, without its value, is `flag` or a prefix of it."""
    return word == flag or (word.startswith("--") and len(word) > LEAST and flag.startswith(word))
