"""SHA-256 of files, cached by properties that change with their content, so that a large checkpoint is read once.

A file counts as unchanged while its size, times of change, device and inode are the same; the inode's own time of
change (ctime) advances with every write, even if a program resets the other one.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kt_model.jsonfile import read_json_or_empty, write_json
from kt_model.user_paths import cache_root

CHUNK_BYTES = 1 << 22
SETTLED_NS = 2_000_000_000
"""A file changed more recently than this may change again within its clock's tick, so its digest is not cached."""


Stamp = list[int]
"""Properties of a file that change with its content: size, mtime and ctime in nanoseconds."""
Stamps = list[tuple[str, Stamp]]
"""The same for several files, each with its device and inode, sorted."""


class Cancelled(Exception):
    """Reading was cancelled."""


class Digests:
    """The cached digests. Used as a context manager: new ones are written back at the end."""

    def __init__(self, file: Path | None = None, cancel: threading.Event | None = None) -> None:
        self._file = file or cache_root() / "digests.json"
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
        """The whole file's digest. Raises OSError, or Cancelled."""
        return self.known(path) or self.read(path)

    def known(self, path: Path) -> str | None:
        """The digest of a file that was read before and has not changed since; reads nothing. Raises OSError."""
        key, stamp = _identity(path)
        return self._look_up(key, stamp)

    def known_together(self, what: str, paths: Iterable[Path]) -> str | None:
        """A digest of several files' joint content, as passed to remember_together, if none of them has changed since;
        reads nothing. what: names the digest. Raises OSError."""
        stamps = stamps_of(paths)
        return self._look_up(_key_together(what, stamps), [stamp for _, stamp in stamps])

    def remember_together(self, what: str, stamps: Stamps, digest: str) -> None:
        """Sets what known_together returns; stamps: of the files before they were read."""
        if all(_is_settled(stamp) for _, stamp in stamps):
            self._found[_key_together(what, stamps)] = {"stamp": [stamp for _, stamp in stamps], "sha256": digest}

    def _look_up(self, key: str, stamp: Any) -> str | None:
        """The cache file may contain anything."""
        known = self._found.get(key) or self._known.get(key)
        digest = known.get("sha256") if isinstance(known, dict) and known.get("stamp") == stamp else None
        return digest if isinstance(digest, str) else None

    def read(self, path: Path) -> str:
        """The whole file's digest, read now whatever is cached. Raises OSError, or Cancelled."""
        before = _identity(path)
        digest = self._read_all(path)
        if _identity(path) == before:
            self.remember(before, digest)
        return digest

    def remember(self, identity: tuple[str, Stamp], sha256: str) -> None:
        """Store a file's digest, known to its writer. identity: its entry of stamps_of at that time. A file that has
        just changed is not cached."""
        key, stamp = identity
        if _is_settled(stamp):
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
    """The whole file's digest, without the cache."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamps_of(paths: Iterable[Path]) -> Stamps:
    """Of these files now: while it stays the same, so does their content. Raises OSError."""
    return sorted(map(_identity, paths))


def _is_settled(stamp: Stamp) -> bool:
    return time.time_ns() - stamp[2] > SETTLED_NS


def _key_together(what: str, stamps: Stamps) -> str:
    return f"{what}:{hashlib.sha256(' '.join(key for key, _ in stamps).encode()).hexdigest()}"


def _identity(path: Path) -> tuple[str, Stamp]:
    stat = path.stat()
    return f"{stat.st_dev}:{stat.st_ino}", [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
