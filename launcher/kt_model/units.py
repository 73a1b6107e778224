"""Sizes of memory in binary units."""

from __future__ import annotations

MIB, GIB = 1 << 20, 1 << 30


def gib(size: int) -> str:
    """So many bytes in GiB, without the unit."""
    return f"{size / GIB:.2f}" if size < 10 * GIB else f"{size / GIB:.1f}"
