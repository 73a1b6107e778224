"""Which names of models and adapters can stand in a request."""

from __future__ import annotations

import re

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")


def cannot_stand(name: str) -> str:
    """What is wrong with a name that does not match NAME."""
    return f"{name!r} cannot be used in a request; letters, digits and . _ - / are expected"
