"""streamed_sums.py as Triton kernels, for a GPU.

What differs from batch to batch is not specialized: Triton would compile a kernel again for a number that is 1 or a
multiple of 16, or an address that is none, in the middle of somebody's prompt.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024
"""Columns per program."""


@triton.jit  # type: ignore[untyped-decorator]
def _silu_and_mul(  # type: ignore[no-untyped-def]  # Triton compiles annotations, too
    gate_up, more, out, columns, HAS_MORE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = at < columns
    gate = tl.load(gate_up + row * 2 * columns + at, mask=here, other=0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * columns + columns + at, mask=here, other=0).to(tl.float32)
    if HAS_MORE:
        gate += tl.load(more + row * 2 * columns + at, mask=here, other=0).to(tl.float32)
        up += tl.load(more + row * 2 * columns + columns + at, mask=here, other=0).to(tl.float32)
    tl.store(out + row * columns + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["nowhere"])  # type: ignore[untyped-decorator]
def _weighted_sum(  # type: ignore[no-untyped-def]
    out, rows, places, weights, nowhere, columns, row_stride, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = at < columns
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for choice in range(TOP_K):
        place = tl.load(places + token * TOP_K + choice)
        weight = tl.load(weights + token * TOP_K + choice).to(tl.float32)
        row = tl.load(rows + place * row_stride + at, mask=here & (place >= nowhere), other=0).to(tl.float32)
        total += tl.where(place >= nowhere, weight, 0.0) * row
    tl.store(out + token * columns + at, total.to(out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize_on_alignment=["end", "weights"])  # type: ignore[untyped-decorator]
def _add_rows(  # type: ignore[no-untyped-def]
    out, rows, places, end, weights, columns, out_stride, row_stride, HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr
):
    choice = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(places + choice)
    here = (at < columns) & (place < tl.load(end))
    added = tl.load(rows + place * row_stride + at, mask=here, other=0)
    if HAS_WEIGHTS:
        added = (added.to(tl.float32) * tl.load(weights + choice)).to(out.dtype.element_ty)
    before = tl.load(out + choice * out_stride + at, mask=here, other=0)
    total = before.to(tl.float32) + added.to(tl.float32)
    tl.store(out + choice * out_stride + at, total.to(out.dtype.element_ty), mask=here)


def silu_and_mul(gate_up_PI: torch.Tensor, more_PI: torch.Tensor | None = None) -> torch.Tensor:
    """gate_up and more are contiguous."""
    rows, columns = gate_up_PI.shape[0], gate_up_PI.shape[1] // 2
    out = gate_up_PI.new_empty(rows, columns)
    more = gate_up_PI if more_PI is None else more_PI
    grid = (rows, triton.cdiv(columns, BLOCK))
    _silu_and_mul[grid](gate_up_PI, more, out, columns, HAS_MORE=more_PI is not None, BLOCK=BLOCK)
    return out


def weighted_sum(
    out_TH: torch.Tensor, rows_PH: torch.Tensor, places_TK: torch.Tensor, weights_TK: torch.Tensor, nowhere: int
) -> None:
    """out, places and weights are contiguous."""
    tokens, columns = out_TH.shape
    grid = (tokens, triton.cdiv(columns, BLOCK))
    stride, top_k = rows_PH.stride(0), places_TK.shape[1]
    _weighted_sum[grid](out_TH, rows_PH, places_TK, weights_TK, nowhere, columns, stride, TOP_K=top_k, BLOCK=BLOCK)


def add_rows(
    out_PX: torch.Tensor,
    rows_PX: torch.Tensor,
    places_P: torch.Tensor,
    ends_G: torch.Tensor,
    weights_P: torch.Tensor | None,
) -> None:
    """places, ends and weights are contiguous."""
    choices, columns = out_PX.shape
    grid = (choices, triton.cdiv(columns, BLOCK))
    weighted = weights_P is not None
    weights = weights_P if weighted else places_P
    strides = out_PX.stride(0), rows_PX.stride(0)
    _add_rows[grid](
        out_PX, rows_PX, places_P, ends_G[-1:], weights, columns, *strides, HAS_WEIGHTS=weighted, BLOCK=BLOCK
    )
