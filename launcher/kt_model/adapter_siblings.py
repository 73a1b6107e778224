"""Which folder an adapter lies in among others. Goes by names alone and opens no file."""

from __future__ import annotations

from pathlib import Path

SNAPSHOTS, BLOBS = "snapshots", "blobs"
"""Of a repository in the Hugging Face cache: files of a snapshot are links to blobs."""


def siblings_folder(folder: Path) -> Path:
    """The folder that an adapter's neighbours are expected in: its parent, or its repository in the Hugging Face cache;
    itself where the parent is the root of all."""
    if repository := cache_repository(folder):
        return repository
    return folder.parent if folder.parent.name else folder


def cache_repository(folder: Path) -> Path | None:
    """The repository of the Hugging Face cache whose snapshot this is, or a folder of it."""
    for snapshot in (folder, *folder.parents):
        if snapshot.parent.name == SNAPSHOTS and snapshot.parent.parent.name.startswith("models--"):
            return snapshot.parent.parent
    return None
