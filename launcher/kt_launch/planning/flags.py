"""What a word of server.extra_args is to SGLang's parser, which takes the beginning of a flag for the flag."""

from __future__ import annotations

LEAST = len("--d")
"""Shorter beginnings fit many flags, and the parser itself refuses them."""


def is_flag(word: str, flag: str) -> bool:
    """Whether `word`, without its value, is `flag` or a beginning of it."""
    return word == flag or (word.startswith("--") and len(word) > LEAST and flag.startswith(word))
