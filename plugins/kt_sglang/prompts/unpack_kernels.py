"""The formulas of unpacking.py as a Triton kernel: reads packed bytes once and writes bfloat16 once.

A program handles one block of 16 rows and GROUPS groups of 32 inputs. Neighbouring threads handle neighbouring rows of
one group, so that reads are contiguous, and the 64 bytes of each row are written at once. Blocks are `outer` groups of
`inner`, with separate strides: a matrix's blocks are N × (gate, up) × blocks, or N × blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

ROWS = 16
"""Rows of a block."""
GROUP = 32
GROUPS = 8
_BITS = {"bf16": 16, "int8": 8, "int4": 4}


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]  # Triton compiles annotations, too
    values,
    scales,
    rows,
    groups,
    count_1,
    count_2,
    value_stride_0,
    value_stride_1,
    value_stride_2,
    scale_stride_0,
    scale_stride_1,
    scale_stride_2,
    row_stride_0,
    row_stride_1,
    row_stride_2,
    row_stride,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    at_2 = block % count_2
    at_1 = block // count_2 % count_1
    at_0 = block // (count_1 * count_2)
    values += at_0 * value_stride_0 + at_1 * value_stride_1 + at_2 * value_stride_2
    rows += at_0 * row_stride_0 + at_1 * row_stride_1 + at_2 * row_stride_2
    scales += at_0 * scale_stride_0 + at_1 * scale_stride_1 + at_2 * scale_stride_2
    place = tl.arange(0, 16 * GROUPS)
    row = (place % 16)[:, None]
    group = tl.program_id(1) * GROUPS + (place // 16)[:, None]
    input_ = tl.arange(0, 32)[None, :]
    here = group < groups
    target = rows + row * row_stride + group * 32 + input_
    if BITS == 16:
        word = group * 16 + input_ // 2
        tl.store(target, tl.load(values + word * 32 + row * 2 + input_ % 2, mask=here, other=0), mask=here)
    if BITS == 8:
        word = group * 8 + input_ // 4
        value = tl.load(values + word * 64 + row * 4 + input_ % 4, mask=here, other=0).to(tl.int32) - 128
        scale = tl.load(scales + row)
        tl.store(target, (value.to(tl.float32) * scale).to(tl.bfloat16), mask=here)
    if BITS == 4:
        word = group * 4 + input_ % 16 // 4
        both = tl.load(values + word * 64 + row * 4 + input_ % 4, mask=here, other=0).to(tl.int32)
        value = ((both >> (input_ // 16 * 4)) & 15) - 8
        scale = tl.load(scales + group * 16 + row, mask=here, other=0).to(tl.float32)
        tl.store(target, (value.to(tl.float32) * scale).to(tl.bfloat16), mask=here)


def unpack(number_format: str, blocks: torch.Tensor, rows: torch.Tensor) -> None:
    """Blocks (…, bytes) to bfloat16 rows (…, 16, K), with one or two dimensions between the first and those."""
    unpacker(number_format, blocks, rows)()


def unpacker(number_format: str, blocks: torch.Tensor, rows: torch.Tensor) -> Callable[[], None]:
    """`unpack`, prepared for this memory."""
    if blocks.dim() == 3:
        blocks, rows = blocks.unsqueeze(1), rows.unsqueeze(1)
    bits, inputs = _BITS[number_format], rows.shape[-1]
    cut = inputs * ROWS * bits // 8
    values, target = blocks[..., :cut], rows
    scales: Any = values
    if number_format == "bf16":
        values, target = values.view(torch.int16), rows.view(torch.int16)
    else:
        scales = blocks[..., cut:].view(torch.float32 if number_format == "int8" else torch.bfloat16)
    groups = inputs // GROUP
    grid = (values.shape[0] * values.shape[1] * values.shape[2], triton.cdiv(groups, GROUPS))
    return partial(
        _kernel[grid],
        values,
        scales,
        target,
        groups,
        values.shape[1],
        values.shape[2],
        *values.stride()[:3],
        *scales.stride()[:3],
        *target.stride()[:4],
        BITS=bits,
        GROUPS=GROUPS,
    )
