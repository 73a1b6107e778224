"""SHA-256 of files, remembered by what changes with their content, so that a large checkpoint is read once.

A file is taken for unchanged while its size, its times of change, its device and inode are; the inode's own time of
change (ctime) moves with every write, also where a program sets the other one back.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kt_model.jsonfile import read_json_or_empty, write_json
from kt_model.user_paths import expanded

CHUNK_BYTES = 1 << 22
SETTLED_NS = 2_000_000_000
"""A file changed less than this ago may change again within its clock's tick, and is not remembered."""


Stamp = list[int]
"""Of a file, what changes with its content: size, mtime and ctime in nanoseconds."""
Stamps = list[tuple[str, Stamp]]
"""Of several files, each with its device and inode, sorted."""


class Cancelled(Exception):
    """The reading was ended before it was done."""


def digests_file() -> Path:
    """Where the digests are remembered."""
    from platformdirs import user_cache_dir

    root = os.environ.get("KT_LAUNCH_CACHE") or user_cache_dir("kt-launch", appauthor=False)
    return expanded(root) / "digests.json"


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
        return self._look_up(key, stamp)

    def known_together(self, what: str, paths: Iterable[Path]) -> str | None:
        """A digest of what several files hold together, which remember_together was told of, if none of them has
        changed since; reads nothing. what: names the digest. Raises OSError."""
        stamps = stamps_of(paths)
        return self._look_up(_key_together(what, stamps), [stamp for _, stamp in stamps])

    def remember_together(self, what: str, stamps: Stamps, digest: str) -> None:
        """What known_together answers from now on; stamps: of the files before they were read."""
        if all(_is_settled(stamp) for _, stamp in stamps):
            self._found[_key_together(what, stamps)] = {"stamp": [stamp for _, stamp in stamps], "sha256": digest}

    def _look_up(self, key: str, stamp: Any) -> str | None:
        """The file of remembered digests may hold anything."""
        known = self._found.get(key) or self._known.get(key)
        digest = known.get("sha256") if isinstance(known, dict) and known.get("stamp") == stamp else None
        return digest if isinstance(digest, str) else None

    def read(self, path: Path) -> str:
        """Of the whole file, read now whatever was remembered. Raises OSError, or Cancelled."""
        before = _identity(path)
        digest = self._read_all(path)
        if _identity(path) == before:
            self.remember(before, digest)
        return digest

    def remember(self, identity: tuple[str, Stamp], sha256: str) -> None:
        """What the digest of a file is, as its writer knows; identity: one of stamps_of, when it was so. A file that
        changed a moment before now is not remembered."""
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
    """Of a whole file, of which nothing is remembered."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamps_of(paths: Iterable[Path]) -> Stamps:
    """Of these files now: while it stays the same, so does what they hold. Raises OSError."""
    return sorted(map(_identity, paths))


def _is_settled(stamp: Stamp) -> bool:
    return time.time_ns() - stamp[2] > SETTLED_NS


def _key_together(what: str, stamps: Stamps) -> str:
    return f"{what}:{hashlib.sha256(' '.join(key for key, _ in stamps).encode()).hexdigest()}"


def _identity(path: Path) -> tuple[str, Stamp]:
    stat = path.stat()
    return f"{stat.st_dev}:{stat.st_ino}", [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
