"""Valid names of models and adapters in requests."""

from __future__ import annotations

import re

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")


def cannot_stand(name: str) -> str:
    """The error for a name that does not match NAME."""
    return f"{name!r} cannot be used in a request; letters, digits and . _ - / are expected"
