"""Writes one safetensors file piece by piece: the header from the tensors' specs, then each tensor in turn.

A file gets its name only when it is complete, on disk and hashed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from kt_model.atomic_file import disk_errors, whole_file
from kt_model.tensors.header import BITS

NAMES: Mapping[str, str] = {
    "uint8": "U8", "int8": "I8", "uint16": "U16", "float32": "F32", "float16": "F16",
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written. dtype: as the format names it."""

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
    """Writes one file. Use it as a context manager: after an exception, no part of the file is left."""

    def __init__(
        self,
        path: Path,
        specs: Sequence[TensorSpec],
        metadata: Mapping[str, str] | None = None,
        alignment: int = 8,
    ) -> None:
        self.path = path
        self._whole = whole_file(path)
        self._waiting = list(specs)
        self._metadata = dict(metadata or {})
        self._alignment = alignment
        self._hash = hashlib.sha256()
        self.sha256 = ""
        self.bytes = 0

    def __enter__(self) -> ShardWriter:
        with disk_errors(self.path):
            self._file = self._whole.__enter__()
        try:
            self._write(_header(self._waiting, self._metadata, self._alignment))
        except BaseException:
            self.__exit__(*sys.exc_info())
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
            self._file.write(content)
        self._hash.update(content)
        self.bytes += len(content)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert kind or not self._waiting, f"{len(self._waiting)} announced tensors did not come"
        with disk_errors(self.path):
            self._whole.__exit__(kind, error, trace)
        self.sha256 = self._hash.hexdigest()


def _header(specs: Sequence[TensorSpec], metadata: Mapping[str, str], alignment: int) -> bytes:
    """Padded so that the first tensor begins at a multiple of `alignment`."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    reached = 0
    for one in specs:
        entries[one.name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": [reached, reached + one.size]}
        reached += one.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % alignment)
    return len(text).to_bytes(8, "little") + text
