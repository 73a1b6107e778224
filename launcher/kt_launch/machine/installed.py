"""What is installed: the product itself, and what it stands on."""

from __future__ import annotations

import contextlib
import platform
from importlib import metadata


def version() -> str:
    """Name and version of the installed product."""
    try:
        return f"kt-launch {metadata.version('kt-launch')}"
    except metadata.PackageNotFoundError:
        return "kt-launch (not installed)"


def versions() -> dict[str, str]:
    """Of what decides how fast and how exact a server is."""
    found = {}
    for name in ("kt-launch", "sglang", "torch", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return {**found, "Python": platform.python_version()}
