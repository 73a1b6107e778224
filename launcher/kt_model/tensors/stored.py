"""Tensors of safetensors files as stored: mapped, viewed, sliced, and converted to float32 only on request."""

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

# numpy has no bfloat16: it is handled as the upper half of a float32.
DTYPES: Mapping[str, Any] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
HELD_BYTES = 1 << 28
"""Bytes of mapped files that readers keep in memory before they release them."""


class MappedFile:
    """A file's bytes, mapped. Pages that were read count as this process's memory until they are released."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self.bytes = np.frombuffer(self._pages, np.uint8)

    def forget(self) -> None:
        """Release the pages; views stay valid, and read them again when used."""
        self._pages.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class Stored:
    """A view of one tensor's bytes. dtype: as in the file."""

    array: npt.NDArray[Any]
    dtype: str
    file: MappedFile | None = None
    """The mapping that holds the bytes, unless they are a copy."""

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
        """Release the pages of its file."""
        if self.file is not None:
            self.file.forget()

    def float32(self) -> Float32:
        """The values; exact for every supported dtype."""
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
        """Largest absolute value; 0 if it is empty."""
        if self.array.size == 0:
            return 0.0
        if self.dtype != "BF16":
            return float(np.abs(self.array).max())
        bits = np.uint32(
            (self.array & np.uint16(0x7FFF)).max()
        )  # without the sign, bit patterns are ordered like the numbers
        return float((np.array([bits << 16], np.uint32)).view(np.float32)[0])


def open_tensors(path: Path) -> Iterator[tuple[str, Stored | str]]:
    """Every tensor of a safetensors file, mapped; for a non-float tensor only the dtype's name."""
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
    """Bytes as numbers; a copy only if the file does not align them."""
    aligned = raw.ctypes.data % np.dtype(dtype).itemsize == 0
    return raw.view(dtype) if aligned else raw.copy().view(dtype)


def round_to_bfloat16(values: Float32) -> npt.NDArray[np.uint16]:
    """Nearest bfloat16, ties to even, as its 16 bits."""
    bits = values.view(np.uint32)
    rounded = (((bits >> 16) & 1) + bits + 0x7FFF) >> 16  # only NaN can overflow
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)
