"""SHA-256 of files, remembered by what changes with their content, so that a large checkpoint is read once.

A file is taken for unchanged while its size, its times of change, its device and inode are; the inode's own time of
change (ctime) moves with every write, also where a program sets the other one back.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path
from typing import Any

from kt_model.jsonfile import read_json_or_empty, write_json

CHUNK_BYTES = 1 << 22
SETTLED_NS = 2_000_000_000
"""A file changed less than this ago may change again within its clock's tick, and is not remembered."""


class Cancelled(Exception):
    """The reading was ended before it was done."""


def digests_file() -> Path:
    """Where the digests are remembered."""
    from platformdirs import user_cache_dir

    root = os.environ.get("KT_LAUNCH_CACHE") or user_cache_dir("kt-launch", appauthor=False)
    return Path(root).expanduser() / "digests.json"


class Digests:
    """The remembered digests. Used as a context: what was found is written back at the end."""

    def __init__(self, file: Path | None = None, cancel: threading.Event | None = None) -> None:
        self._file = file or digests_file()
        self._cancel = cancel or threading.Event()
        self._found: dict[str, Any] = {}
        self.bytes_read = 0

    def __enter__(self) -> Digests:
        self._known = read_json_or_empty(self._file)
        return self

    def __exit__(self, *_: object) -> None:
        if self._found:
            self._remember()

    def sha256(self, path: Path) -> str:
        """Of the whole file. Raises OSError, or Cancelled."""
        return self.known(path) or self.read(path)

    def known(self, path: Path) -> str | None:
        """Of a file that was read before and has not changed since; reads nothing. Raises OSError."""
        key, stamp = _identity(path)
        known = self._found.get(key) or self._known.get(key)
        return str(known["sha256"]) if known and known["stamp"] == stamp else None

    def read(self, path: Path) -> str:
        """Of the whole file, read now whatever was remembered. Raises OSError, or Cancelled."""
        before = _identity(path)
        digest = self._read_all(path)
        if _identity(path) == before:
            self.remember(path, digest)
        return digest

    def remember(self, path: Path, sha256: str) -> None:
        """What the file's digest is, as its writer knows; a file that changed a moment ago is not remembered."""
        key, stamp = _identity(path)
        if time.time_ns() - stamp[2] > SETTLED_NS:
            self._found[key] = {"stamp": stamp, "sha256": sha256}

    def _read_all(self, path: Path) -> str:
        state = hashlib.sha256()
        with path.open("rb", buffering=0) as opened:
            while chunk := opened.read(CHUNK_BYTES):
                if self._cancel.is_set():
                    raise Cancelled(str(path))
                state.update(chunk)
                self.bytes_read += len(chunk)
        return state.hexdigest()

    def _remember(self) -> None:
        from filelock import FileLock

        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._file.with_suffix(".lock"), timeout=5):
                write_json(self._file, read_json_or_empty(self._file) | self._found)
        except (OSError, TimeoutError):
            return  # only a cache: the next run reads the files again


def sha256_of(path: Path) -> str:
    """Of a whole file, of which nothing is remembered."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _identity(path: Path) -> tuple[str, list[int]]:
    stat = path.stat()
    return f"{stat.st_dev}:{stat.st_ino}", [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
