"""The formulas of unpacking.py as a Triton kernel: reads packed bytes once and writes bfloat16 once.

A program handles one block of 16 rows and WORDS words of each. Blocks are `outer` groups of `inner`, with separate
strides: a matrix's blocks are N × (gate, up) × blocks, or N × blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

ROWS = 16
"""Rows of a block."""
WORDS = 64
_FORMATS = {"bf16": 2, "int8": 4, "int4": 8}
"""Inputs in a word."""


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]  # Triton compiles annotations, too
    words,
    scales,
    rows,
    inputs,
    count_1,
    count_2,
    word_stride_0,
    word_stride_1,
    word_stride_2,
    scale_stride_0,
    scale_stride_1,
    scale_stride_2,
    row_stride_0,
    row_stride_1,
    row_stride_2,
    row_stride,
    PER_WORD: tl.constexpr,
    WORDS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    at_2 = block % count_2
    at_1 = block // count_2 % count_1
    at_0 = block // (count_1 * count_2)
    words += at_0 * word_stride_0 + at_1 * word_stride_1 + at_2 * word_stride_2
    rows += at_0 * row_stride_0 + at_1 * row_stride_1 + at_2 * row_stride_2
    scales += at_0 * scale_stride_0 + at_1 * scale_stride_1 + at_2 * scale_stride_2
    first = tl.program_id(1) * WORDS
    word = first + tl.arange(0, WORDS)
    row = tl.arange(0, 16)
    here = word < inputs // PER_WORD
    loaded = tl.load(words + word[:, None] * 16 + row[None, :], mask=here[:, None], other=0)
    value = tl.trans(loaded)
    if PER_WORD == 2:
        tl.store(rows + row[:, None] * row_stride + word[None, :], value, mask=here[None, :])
    if PER_WORD == 4:
        scale = tl.load(scales + row)[:, None]
        b0 = ((value & 255) - 128).to(tl.float32) * scale
        b1 = (((value >> 8) & 255) - 128).to(tl.float32) * scale
        b2 = (((value >> 16) & 255) - 128).to(tl.float32) * scale
        b3 = (((value >> 24) & 255) - 128).to(tl.float32) * scale
        all_ = tl.interleave(tl.interleave(b0, b2), tl.interleave(b1, b3))
        at = first * 4 + tl.arange(0, WORDS * 4)
        tl.store(rows + row[:, None] * row_stride + at[None, :], all_.to(tl.bfloat16), mask=(at < inputs)[None, :])
    if PER_WORD == 8:
        group = word // 4
        scale = tl.load(scales + group[None, :] * 16 + row[:, None], mask=here[None, :], other=0).to(tl.float32)
        byte = first * 4 + tl.arange(0, WORDS * 4)
        at = byte // 16 * 32 + byte % 16
        for half in tl.static_range(2):
            b0 = (((value >> (4 * half)) & 15) - 8).to(tl.float32) * scale
            b1 = (((value >> (8 + 4 * half)) & 15) - 8).to(tl.float32) * scale
            b2 = (((value >> (16 + 4 * half)) & 15) - 8).to(tl.float32) * scale
            b3 = (((value >> (24 + 4 * half)) & 15) - 8).to(tl.float32) * scale
            all_ = tl.interleave(tl.interleave(b0, b2), tl.interleave(b1, b3))
            place = rows + row[:, None] * row_stride + at[None, :] + 16 * half
            tl.store(place, all_.to(tl.bfloat16), mask=(byte * 2 < inputs)[None, :])


def unpack(number_format: str, blocks: torch.Tensor, rows: torch.Tensor) -> None:
    """Blocks (…, bytes) to bfloat16 rows (…, 16, K), with one or two dimensions between the first and those."""
    if blocks.dim() == 3:
        blocks, rows = blocks.unsqueeze(1), rows.unsqueeze(1)
    per_word, inputs = _FORMATS[number_format], rows.shape[-1]
    cut = inputs // per_word * ROWS * 4
    words = blocks[..., :cut].view(torch.int32)
    scales: Any = words
    if number_format != "bf16":
        scales = blocks[..., cut:].view(torch.float32 if number_format == "int8" else torch.bfloat16)
    target = rows.view(torch.int32) if number_format == "bf16" else rows
    grid = (words.shape[0] * words.shape[1] * words.shape[2], triton.cdiv(inputs // per_word, WORDS))
    _kernel[grid](
        words,
        scales,
        target,
        inputs,
        words.shape[1],
        words.shape[2],
        *words.stride()[:3],
        *scales.stride()[:3],
        *target.stride()[:4],
        PER_WORD=per_word,
        WORDS=WORDS,
    )
