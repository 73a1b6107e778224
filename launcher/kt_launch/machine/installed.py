"""What is installed: the product itself."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """Name and version of the installed product."""
    try:
        return f"kt-launch {metadata.version('kt-launch')}"
    except metadata.PackageNotFoundError:
        return "kt-launch (not installed)"
