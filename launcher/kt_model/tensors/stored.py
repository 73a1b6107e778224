"""Tensors of safetensors files as they lie on disk: mapped, viewed, cut, and turned into float32 only when asked."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kt_model.tensors.header import read_header

Float32 = npt.NDArray[np.float32]

# bfloat16 has no numpy type: it is kept as the upper half of a float32.
DTYPES: Mapping[str, Any] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
HELD_BYTES = 1 << 28
"""Of mapped files, what readers leave in memory before they forget it."""


class MappedFile:
    """A file's bytes, mapped. What is read of them counts as memory of this process until it is forgotten."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self.bytes = np.frombuffer(self._pages, np.uint8)

    def forget(self) -> None:
        """Give the pages back; views stay good, and read them again when they are used."""
        self._pages.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class Stored:
    """A view of one tensor's bytes. dtype: as the file names it."""

    array: npt.NDArray[Any]
    dtype: str
    file: MappedFile | None = None
    """Where the bytes lie, unless they are a copy."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def reshape(self, *shape: int) -> Stored:
        return replace(self, array=self.array.reshape(*shape))

    def __getitem__(self, index: Any) -> Stored:
        return replace(self, array=self.array[index])

    @property
    def T(self) -> Stored:
        return replace(self, array=self.array.T)

    def forget(self) -> None:
        """Give the pages of its file back."""
        if self.file is not None:
            self.file.forget()

    def float32(self) -> Float32:
        """The values; exact for every dtype that is read."""
        if self.dtype == "BF16":
            return (self.array.astype(np.uint32) << 16).view(np.float32)
        return self.array.astype(np.float32)

    def is_finite(self) -> bool:
        if self.dtype == "BF16":
            return bool(np.all((self.array & 0x7F80) != 0x7F80))
        return bool(np.isfinite(self.array).all())

    def is_zero(self) -> bool:
        return self.largest() == 0

    def largest(self) -> float:
        """Largest absolute value; 0 where there are none."""
        if self.array.size == 0:
            return 0.0
        if self.dtype != "BF16":
            return float(np.abs(self.array).max())
        bits = np.uint32((self.array & np.uint16(0x7FFF)).max())  # of numbers without a sign the bits are in order
        return float((np.array([bits << 16], np.uint32)).view(np.float32)[0])


def open_tensors(path: Path) -> Iterator[tuple[str, Stored | str]]:
    """Every tensor of a whole safetensors file, mapped; of one that is no float the dtype's name alone."""
    file, mapped = read_header(path), MappedFile(path)
    for name, tensor in file.tensors.items():
        if tensor.dtype not in DTYPES:
            yield name, tensor.dtype
            continue
        raw = mapped.bytes[file.data_start + tensor.start : file.data_start + tensor.end]
        yield name, Stored(_view(raw, DTYPES[tensor.dtype]).reshape(tensor.shape), tensor.dtype, mapped)


BFLOAT16_MAX = float(np.array([0x7F7F << 16], np.uint32).view(np.float32)[0])
"""The largest finite bfloat16."""


def _view(raw: npt.NDArray[np.uint8], dtype: Any) -> npt.NDArray[Any]:
    """Bytes as numbers; a copy only where the file does not align them."""
    aligned = raw.ctypes.data % np.dtype(dtype).itemsize == 0
    return raw.view(dtype) if aligned else raw.copy().view(dtype)


def round_to_bfloat16(values: Float32) -> npt.NDArray[np.uint16]:
    """Nearest bfloat16, ties to even, as its 16 bits."""
    bits = values.view(np.uint32)
    rounded = (((bits >> 16) & 1) + bits + 0x7FFF) >> 16  # only NaN can overflow
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)
