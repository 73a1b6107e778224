"""Tensors of safetensors files as they lie on disk: mapped, viewed, cut, and turned into float32 only when asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kt_launch.errors import LaunchError
from kt_launch.tensorfile import read_header

Float32 = npt.NDArray[np.float32]

# bfloat16 has no numpy type: it is kept as the upper half of a float32.
DTYPES: Mapping[str, Any] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


@dataclass(frozen=True)
class Stored:
    """A view of one tensor's bytes. dtype: as the file names it."""

    array: npt.NDArray[Any]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def reshape(self, *shape: int) -> Stored:
        return Stored(self.array.reshape(*shape), self.dtype)

    def __getitem__(self, index: Any) -> Stored:
        return Stored(self.array[index], self.dtype)

    @property
    def T(self) -> Stored:
        return Stored(self.array.T, self.dtype)

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
        mask = 0x7FFF if self.dtype == "BF16" else None
        return not (np.any(self.array & mask) if mask else np.any(self.array))


def open_tensors(path: Path) -> Iterator[tuple[str, Stored]]:
    """Every tensor of a whole safetensors file, mapped; a dtype that is no float is refused by name."""
    file = read_header(path)
    data = np.memmap(path, dtype=np.uint8, mode="r") if file.tensors else np.empty(0, np.uint8)
    for name, tensor in file.tensors.items():
        if tensor.dtype not in DTYPES:
            expected = ", ".join(DTYPES)
            raise LaunchError(
                str(path),
                f"{name} has dtype {tensor.dtype}, expected one of {expected}",
                "Save the adapter in bfloat16.",
            )
        raw = np.asarray(data[file.data_start + tensor.start : file.data_start + tensor.end])
        yield name, Stored(_view(raw, DTYPES[tensor.dtype]).reshape(tensor.shape), tensor.dtype)


def _view(raw: npt.NDArray[np.uint8], dtype: Any) -> npt.NDArray[Any]:
    """Bytes as numbers; a copy only where the file does not align them."""
    aligned = raw.ctypes.data % np.dtype(dtype).itemsize == 0
    return raw.view(dtype) if aligned else raw.copy().view(dtype)


def round_to_bfloat16(values: Float32) -> npt.NDArray[np.uint16]:
    """Nearest bfloat16, ties to even, as its 16 bits."""
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
