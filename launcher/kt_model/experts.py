"""Reads routed experts from a checkpoint, one at a time, as bfloat16 bits, whatever type the files store."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kt_model.checkpoint import Checkpoint
from kt_model.errors import LaunchError
from kt_model.families import expert_weights
from kt_model.float8 import FLOAT8, WEIGHT_SCALES, scale_form, scale_of
from kt_model.tensors.folder import Located
from kt_model.tensors.header import Tensor, TensorFile
from kt_model.tensors.stored import DTYPES, HELD_BYTES, Float32, MappedFile, Stored, round_to_bfloat16

PROJECTIONS = ("gate", "up", "down")
Bits = npt.NDArray[np.uint16]
CONFIG = "config.json"
SAMPLE_BYTES = 4096
"""Bytes of each expert's projection that go into the fingerprint."""


class ExpertSource:
    """The experts of one checkpoint. Files are mapped, and pages that were read are released as reading goes on."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.located = base.located
        self._mapped: dict[Path, MappedFile] = {}
        self._held_bytes = 0

    def untie(self) -> None:
        """From now on, treat embedding and output head as two tensors, where one stood for both."""
        self.located = {**self.located, **{name: self.located[other] for name, other in self.base.stand_ins.items()}}

    def read(self, layer: int, expert: int) -> dict[str, Bits]:
        """gate and up (I, H), down (H, I), as bfloat16 bits. NaN and infinity are refused by name."""
        names = expert_weights(self.base.family, layer, expert)
        return {short: self.bits(name) for short, name in zip(PROJECTIONS, names, strict=True)}

    def bits(self, name: str) -> Bits:
        """One tensor."""
        stored = self.stored(name)
        if not stored.is_finite():
            raise self._refuse(name, f"NaN or infinity in {name}", "Get the file again.")
        return stored.array if stored.dtype == "BF16" else round_to_bfloat16(stored.float32())

    def float32(self, name: str, rows: range | None = None) -> Float32:
        """One tensor's values, or some of its rows."""
        return self.stored(name, rows).float32()

    def raw(self, name: str, part: slice = slice(None)) -> npt.NDArray[np.uint8]:
        """The bytes of one tensor stored in the order of its shape, or some of them, mapped."""
        found = self.located[name]
        assert not found.is_transposed, name
        return self._map(found.file, found.tensor.start, found.tensor.end)[part]

    def with_scale(self, name: str) -> list[str]:
        """A tensor's name, and that of its scale, without which it is meaningless."""
        scale = scale_of(name, self.located) if self.located[name].tensor.dtype == FLOAT8 else None
        return [name] if scale is None else [name, scale]

    def as_shaped(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of one tensor in the order of its shape; a copy only if they are stored in another order."""
        found = self.located[name]
        if not found.is_transposed:
            return self.raw(name)
        dtype = np.dtype(np.uint8 if found.tensor.dtype == FLOAT8 else DTYPES[found.tensor.dtype])
        return np.ascontiguousarray(self._transposed(found, dtype)).reshape(-1).view(np.uint8)

    def _map(self, file: TensorFile, start: int, end: int) -> npt.NDArray[np.uint8]:
        """A file's bytes from start to end, counted from the end of its header."""
        if file.path not in self._mapped:
            self._mapped[file.path] = MappedFile(file.path)
        view = self._mapped[file.path].bytes[file.data_start + start : file.data_start + end]
        self._hold(view.nbytes)
        return view

    def samples(self, names: Sequence[str]) -> list[bytes]:
        """The first stored bytes of each, read instead of mapped: a mapped page brings its neighbours into memory."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.located[name].file.path, []).append(name)
        found = {}
        for path, inside in by_file.items():
            with path.open("rb", buffering=0) as file:
                for name in inside:
                    start = self.located[name].file.data_start + self.located[name].tensor.start
                    found[name] = os.pread(file.fileno(), min(SAMPLE_BYTES, self._together(name)), start)
        return [found[name] for name in names]

    def _hold(self, count: int) -> None:
        """Before more than HELD_BYTES are in memory, all are released."""
        self._held_bytes += count
        if self._held_bytes > HELD_BYTES:
            self.forget()
            self._held_bytes = count

    def forget(self) -> None:
        """Release the mapped pages; views of them stay valid."""
        for file in self._mapped.values():
            file.forget()
        self._held_bytes = 0

    def size(self, name: str) -> int:
        """Bytes of one tensor as stored."""
        return _size(self.located[name].tensor)

    def _together(self, name: str) -> int:
        """How many of a tensor's first bytes are contiguous: for a transposed one, a column's."""
        found = self.located[name]
        return self.size(name) // found.tensor.shape[1] if found.is_transposed else self.size(name)

    def expert_bytes(self) -> int:
        """Bytes of all routed experts as stored."""
        return sum(self.layer_bytes(layer) for layer in self.base.moe_layers)

    def layer_bytes(self, layer: int) -> int:
        return sum(_size(self.located[name].tensor) for name in self.layer_names(layer))

    def layer_names(self, layer: int) -> list[str]:
        experts = range(self.base.num_experts)
        return [name for expert in experts for name in expert_weights(self.base.family, layer, expert)]

    def stored(self, name: str, rows: range | None = None) -> Stored:
        """One tensor, or some of its rows, in its stored type; float8 as float32."""
        tensor = self.located[name].tensor
        if tensor.dtype == FLOAT8:
            return Stored(self._from_float8(name, tensor, rows or range(tensor.shape[0])), "F32")
        if tensor.dtype not in DTYPES:
            problem = f"{name} has dtype {tensor.dtype}, expected one of {', '.join((*DTYPES, FLOAT8))}"
            raise self._refuse(name, problem, "Use the bfloat16 checkpoint of this model.")
        dtype = np.dtype(DTYPES[tensor.dtype])
        if self.located[name].is_transposed:
            array = self._transposed(self.located[name], dtype)
            return Stored(array if rows is None else array[rows.start : rows.stop], tensor.dtype)
        shape, part = tensor.shape, slice(None)
        if rows is not None:
            row_bytes = math.prod(shape[1:]) * dtype.itemsize
            shape, part = (len(rows), *shape[1:]), slice(rows.start * row_bytes, rows.stop * row_bytes)
        return Stored(_view(self.raw(name, part), dtype).reshape(shape), tensor.dtype)

    def _transposed(self, found: Located, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """(out, in) of what is stored as (in, out), as a view."""
        assert found.part is not None
        columns = found.tensor.shape[1]
        start = found.tensor.start - found.part.first * dtype.itemsize
        raw = self._map(found.file, start, start + found.part.rows * columns * dtype.itemsize)
        return np.asarray(found.part.cut(_view(raw, dtype).reshape(columns, found.part.rows)))

    def _from_float8(self, name: str, tensor: Tensor, rows: range) -> Float32:
        """Codes times their scales: the tensor's, their row's or their block's."""
        scale = scale_of(name, self.located)
        if scale is None:
            missing = " or ".join(sorted(WEIGHT_SCALES))
            raise self._refuse(name, f"{name} is float8, but its {missing} is missing", "Get all shards.")
        scales, shape = self.float32(scale), tensor.shape
        form = scale_form(scales.shape, shape, self.base.float8_block) if len(shape) == 2 else None
        if form is None:
            problem = f"{scale} has shape {list(scales.shape)}, which is not a scale per tensor, row or block"
            problem += f" of {list(self.base.float8_block)} of {list(shape)}"
            raise self._refuse(name, problem, "Get config.json and the safetensors files from the same source.")
        codes = self.raw(name, slice(rows.start * shape[1], rows.stop * shape[1])).reshape(len(rows), -1)
        return np.asarray(FLOAT8_E4M3[codes] * self._spread(scales, form, rows, shape[1]), dtype=np.float32)

    def _spread(self, scales: Float32, form: str, rows: range, columns: int) -> Float32:
        """Scales of some rows, broadcastable to (rows, columns)."""
        if form != "block":
            return scales.reshape(-1, 1)[rows.start : rows.stop] if form == "row" else scales.reshape(1, 1)
        tall, wide = self.base.float8_block
        return scales[np.arange(rows.start, rows.stop) // tall].repeat(wide, axis=1)[:, :columns]

    def _refuse(self, name: str, problem: str, fix: str) -> LaunchError:
        return LaunchError(str(self.located[name].file.path), problem, fix)


def _view(raw: npt.NDArray[np.uint8], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Bytes as numbers; a copy only if the file does not align them."""
    return (raw if raw.ctypes.data % dtype.itemsize == 0 else raw.copy()).view(dtype)


def _size(tensor: Tensor) -> int:
    return tensor.end - tensor.start


def _float8_table() -> Float32:
    """Value of each of the 256 codes: sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7F and 0xFF are NaN."""
    codes = np.arange(256)
    sign, exponent, mantissa = np.where(codes & 0x80, -1.0, 1.0), (codes >> 3) & 0xF, codes & 0x7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    values = sign * np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    values[(codes & 0x7F) == 0x7F] = np.nan
    return values.astype(np.float32)


FLOAT8_E4M3 = _float8_table()


def fingerprint(source: ExpertSource) -> str:
    """Distinguishes most checkpoints without reading their weights: all headers, and the first bytes of each expert's
    matrices. It names folders. Two checkpoints may share it; weights/identity.py identifies exactly what a folder was
    made from."""
    state = hashlib.sha256()
    for name in sorted(source.located):
        tensor = source.located[name].tensor
        state.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
    for layer in source.base.moe_layers:
        for sample in source.samples(source.layer_names(layer)):
            state.update(sample)
    return state.hexdigest()


def revision(folder: Path) -> str | None:
    """The commit of a Hugging Face cache snapshot, if the folder is one."""
    match = re.search(r"/snapshots/([0-9a-f]{40})/?$", str(folder.resolve()))
    return match[1] if match else None


def float32_of(bits: Bits) -> Float32:
    """Values of bfloat16 bits."""
    return Stored(bits, "BF16").float32()


def as_tensors(arrays: Mapping[str, Bits]) -> dict[str, Any]:
    """The bits as torch's bfloat16, which kt_kernels expects; numpy has no such type."""
    import torch

    return {name: torch.from_numpy(bits.copy()).view(torch.bfloat16) for name, bits in arrays.items()}
