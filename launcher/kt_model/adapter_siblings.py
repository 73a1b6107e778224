"""The folder in which an adapter's siblings are expected. Uses names alone and opens no file."""

from __future__ import annotations

from pathlib import Path

SNAPSHOTS, BLOBS = "snapshots", "blobs"
"""In a repository of the Hugging Face cache: files of a snapshot are links to blobs."""


def siblings_folder(folder: Path) -> Path:
    """The folder in which other adapters are expected: the adapter's parent, or its repository in the Hugging Face
    cache; the folder itself if its parent is the root directory."""
    if repository := cache_repository(folder):
        return repository
    return folder.parent if folder.parent.name else folder


def cache_repository(folder: Path) -> Path | None:
    """The repository of the Hugging Face cache that contains this folder in a snapshot, or None."""
    for snapshot in (folder, *folder.parents):
        if snapshot.parent.name == SNAPSHOTS and snapshot.parent.parent.name.startswith("models--"):
            return snapshot.parent.parent
    return None
