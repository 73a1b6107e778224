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


def typed_flags(words: Sequence[str]) -> frozenset[str]:
    """Flags as they are typed, without values that = joins to them; and all words between."""
    return frozenset(word.partition("=")[0] for word in words)


def requested(words: Sequence[str], flags: Sequence[str]) -> int:
    """The number that server.extra_args gives by one of these flags; 1 if it gives none, or not a number, which SGLang
    refuses. SGLang's parser accepts a prefix of a flag, and the last of repeated flags counts."""
    found = 1
    for flag, value in flags_in(words):
        if any(is_flag(flag, each) for each in flags):
            found = max(1, int(value)) if value.isdecimal() else 1
    return found
