"""How SGLang's parser reads a word of server.extra_args: it accepts a prefix of a flag as the flag."""

from __future__ import annotations

LEAST = len("--d")
"""Shorter prefixes match many flags, and the parser itself refuses them."""


def is_flag(word: str, flag: str) -> bool:
    """Whether `word`, without its value, is `flag` or a prefix of it."""
    return word == flag or (word.startswith("--") and len(word) > LEAST and flag.startswith(word))
