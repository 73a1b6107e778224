"""What the kernel reports in files below /proc and /sys, and in its log. The rest of this room reads it from here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path


def read_text(path: Path) -> str:
    """'' if the file does not exist or may not be read."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def find(pattern: str, text: str) -> str:
    """The group in the first match, with ^ and $ at the ends of lines; '' without a match."""
    match = re.search(pattern, text, re.MULTILINE)
    return match[1] if match else ""


def cgroup_places(root: Path, controller: str) -> Iterator[tuple[Path, str, bool]]:
    """Where the tree of this process's cgroup may be mounted, the cgroup's path in it, and whether it is version 2."""
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        version_2 = controllers == ""
        if version_2 or controller in controllers.split(","):
            for name in ("", "unified") if version_2 else (controllers, controller):
                yield root / "sys/fs/cgroup" / name, group.strip("/"), version_2


def cgroup_folders(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """The folders of this process's cgroup and of all its parents, each with whether it is version 2."""
    for mount, group, version_2 in cgroup_places(root, controller):
        yield mount, version_2
        names = group.split("/")
        yield from ((mount.joinpath(*names[:depth]), version_2) for depth in range(1, len(names) + 1))


def log_lines() -> list[str]:
    """The kernel's ring buffer, if this user may read it."""
    try:
        handle = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return []
    lines = []
    try:
        while True:
            lines.append(os.read(handle, 8192).decode(errors="replace").partition(";")[2])
    except OSError:
        return lines
    finally:
        os.close(handle)
