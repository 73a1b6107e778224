"""Reads and validates the header of a safetensors file: names, types, shapes, offsets. Never a tensor, never a pickle.

A file is judged by its content, whatever its name ends in.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kt_model.errors import LaunchError

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

FOREIGN = (
    (b"PK\x03\x04", "a torch pickle (zip archive)"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x03", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
)
JSON_BEGINS = b"\0\0\0\0{"
"""Bytes 4 to 8 of every safetensors file: the upper half of the header's length, and the header's first character. The
lower half may look like a pickle: a header of 1152 bytes begins with 0x80 0x04."""


@dataclass(frozen=True)
class Tensor:
    """The location of one tensor: dtype as the format names it, shape, and byte range after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class TensorFile:
    """A validated header."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    data_start: int


def read_header(path: Path) -> TensorFile:
    """The header of a complete and consistent safetensors file."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise _refuse(path, "is no regular file")
        size = found.st_size
        with path.open("rb") as file:
            start = file.read(32)
            _refuse_foreign(path, start)
            length = _header_length(path, start, size)
            file.seek(8)
            text = file.read(length)
    except OSError as failure:
        raise LaunchError(
            str(path), f"cannot be read ({failure.strerror})", "Check the file and its permissions."
        ) from failure
    content = _parse(path, text)
    metadata = content.pop("__metadata__", {})
    tensors = {name: _tensor(path, name, entry) for name, entry in content.items()}
    _validate_places(path, tensors, size - 8 - length)
    return TensorFile(path, tensors, metadata if isinstance(metadata, dict) else {}, 8 + length)


def _refuse(path: Path, problem: str, fix: str = "Download the file again.") -> LaunchError:
    return LaunchError(str(path), problem, fix)


def _refuse_foreign(path: Path, start: bytes) -> None:
    if start[4:9] == JSON_BEGINS:
        return
    for magic, what in FOREIGN:
        if start.startswith(magic):
            fix = "It is not opened, since pickles can run code. Save it again with safe_serialization=True."
            raise _refuse(
                path, f"{what}, but a safetensors file is expected", fix if "pickle" in what else "Get the real file."
            )


def _header_length(path: Path, start: bytes, size: int) -> int:
    if len(start) < 8:
        raise _refuse(path, f"{size} bytes long, too short for a safetensors file")
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise _refuse(
            path, f"not a safetensors file: its header would be {length} bytes, {MAX_HEADER_BYTES} at most are allowed"
        )
    if length > size - 8:
        raise _refuse(path, f"truncated: its header is {length} bytes, the whole file {size}")
    if start[8:9] != b"{":
        raise _refuse(path, "not a safetensors file: its header is no JSON object")
    return length


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            raise _refuse(path, "broken header: a name appears in it twice")
        return content

    try:
        content = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as failure:
        raise _refuse(path, "broken header: no JSON") from failure
    if not isinstance(content, dict):
        raise _refuse(path, "broken header: no JSON object")
    return content


def _tensor(path: Path, name: str, entry: Any) -> Tensor:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, end]
        right = all(type(number) is int and number >= 0 for number in numbers)
    except (TypeError, KeyError, ValueError) as failure:
        raise _refuse(path, f"broken header: the entry of {name}") from failure
    if not right:
        raise _refuse(path, f"broken header: sizes of {name}")
    if dtype not in BITS:
        raise _refuse(path, f"unknown dtype {dtype} of {name}", f"Known are {', '.join(BITS)}.")
    if math.prod(shape) * BITS[dtype] != (end - start) * 8:
        raise _refuse(path, f"broken header: {name} of shape {list(shape)} and dtype {dtype} has {end - start} bytes")
    return Tensor(dtype, tuple(shape), start, end)


def _validate_places(path: Path, tensors: Mapping[str, Tensor], data_bytes: int) -> None:
    """Tensors are contiguous without gap or overlap, up to the end of the file."""
    reached = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != reached:
            raise _refuse(path, f"broken header: {name} starts at byte {tensor.start}, {reached} is expected")
        reached = tensor.end
    if data_bytes < reached:
        raise _refuse(path, f"truncated: {data_bytes} bytes of tensors, {reached} are expected")
    if data_bytes > reached:
        raise _refuse(path, f"{data_bytes - reached} bytes too long")
