"""Writes one safetensors file piece by piece: the header from what is announced, then each tensor as it comes.

A file gets its name only when it is whole, on the disk and hashed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kt_model.errors import LaunchError
from kt_model.tensors.header import BITS

NAMES: Mapping[str, str] = {
    "uint8": "U8", "int8": "I8", "uint16": "U16", "float32": "F32", "float16": "F16",
}  # fmt: skip


@dataclass(frozen=True)
class Announced:
    """A tensor that will come. dtype: as the format names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        bits = BITS[self.dtype]
        for dimension in self.shape:
            bits *= dimension
        return bits // 8


class ShardWriter:
    """One file in the making; a context: left by an exception, nothing remains of it."""

    def __init__(
        self,
        path: Path,
        announced: Sequence[Announced],
        metadata: Mapping[str, str] | None = None,
        alignment: int = 8,
    ) -> None:
        self.path = path
        self._draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._waiting = list(announced)
        self._metadata = dict(metadata or {})
        self._alignment = alignment
        self._hash = hashlib.sha256()
        self.sha256 = ""
        self.bytes = 0

    def __enter__(self) -> ShardWriter:
        with disk_errors(self.path):
            self._file = self._draft.open("wb", buffering=0)
        try:
            self._write(_header(self._waiting, self._metadata, self._alignment))
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, array: npt.NDArray[Any]) -> None:
        """The next tensor, in the order announced."""
        self.write_pieces(name, [array])

    def write_pieces(self, name: str, pieces: Iterable[npt.NDArray[Any]]) -> None:
        """The next tensor, in the order announced, piece by piece."""
        expected, reached = self._waiting.pop(0), self.bytes
        assert name == expected.name, f"{name} came, {expected.name} was announced"
        for piece in pieces:
            self._write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        came = self.bytes - reached
        assert came == expected.size, f"{name}: {came} bytes came, {expected.size} were announced"

    def _write(self, content: bytes | memoryview) -> None:
        with disk_errors(self.path):
            view = memoryview(content)
            while view:
                view = view[self._file.write(view) :]
        self._hash.update(content)
        self.bytes += len(content)

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is not None:
            self._discard()
            return
        assert not self._waiting, f"{len(self._waiting)} announced tensors did not come"
        try:
            with disk_errors(self.path):
                os.fsync(self._file.fileno())
                self._file.close()
                self._draft.replace(self.path)
        except LaunchError:
            self._discard()
            raise
        self.sha256 = self._hash.hexdigest()

    def _discard(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self._draft.unlink(missing_ok=True)


def _header(announced: Sequence[Announced], metadata: Mapping[str, str], alignment: int) -> bytes:
    """Padded so that the first tensor begins at a multiple of `alignment`."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    reached = 0
    for one in announced:
        entries[one.name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": [reached, reached + one.size]}
        reached += one.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % alignment)
    return len(text).to_bytes(8, "little") + text


class DiskError(LaunchError):
    """The disk did not take what was to be written; what it has taken is good."""


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A full disk or a folder that may not be written, in the user's words. Raises DiskError."""
    try:
        yield
    except OSError as failure:
        if failure.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "Free some space and run it again: it goes on where it stopped."
            raise DiskError(str(path), "the disk is full", fix) from failure
        fix = "Name a folder that you may write."
        raise DiskError(str(path), f"cannot be written ({failure.strerror})", fix) from failure


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """All or nothing."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            with draft.open("w") as file:
                json.dump(content, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
