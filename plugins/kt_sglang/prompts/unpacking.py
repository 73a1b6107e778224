"""Converts kt_kernels' packed layout back to bfloat16 matrices, on the device that holds the bytes. Plain torch; on a
GPU, one kernel per format (unpack_kernels.py) with the same results.

The layout is that of kernels/pack.cpp and quantize.cpp: per expert and pool group, blocks of 16 rows; gate and up
blocks alternating over all inputs, then down blocks over the group's part of the intermediate dimension. In a block,
the four bytes of word p of row c are at 64 p + 4 c, followed by the scales. Sizes are padded to 64 with zeros.

Shapes: N experts, H hidden size, I intermediate size, both padded; W a group's part of I; K the inputs of a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

STEP = 64
ROWS = 16
"""Rows of a block."""
GROUP = 32
"""Inputs that share a scale of int4."""
FORMATS = ("bf16", "int8", "int4")


def padded(size: int, step: int = STEP) -> int:
    return -(-size // step) * step


def block_bytes(number_format: str, inputs: int) -> int:
    """Bytes of one block with so many (padded) inputs."""
    row = {"bf16": inputs * 2, "int8": inputs + 4, "int4": inputs // 2 + inputs // GROUP * 2}
    return ROWS * row[number_format]


@dataclass(frozen=True)
class Shard:
    """A pool group's part of each expert: rows of gate and up, inputs of down, starting at `begin`."""

    number_format: str
    hidden: int
    """Unpadded: down has blocks for this many rows."""
    begin: int
    width: int

    @property
    def gate_up_bytes(self) -> int:
        return self.width // ROWS * 2 * block_bytes(self.number_format, padded(self.hidden))

    @property
    def down_bytes(self) -> int:
        return padded(self.hidden, ROWS) // ROWS * block_bytes(self.number_format, self.width) if self.width else 0

    @property
    def expert_bytes(self) -> int:
        return padded(self.gate_up_bytes + self.down_bytes)

    def unpack(self, packed_NB: torch.Tensor, gate_up_N2IH: torch.Tensor, down_NHI: torch.Tensor) -> None:
        """Write this shard's part of N experts, uint8 (N, expert_bytes), into bfloat16 matrices of padded sizes."""
        for unpacker in self.unpackers(packed_NB, gate_up_N2IH, down_NHI):
            unpacker()

    def unpackers(
        self, packed_NB: torch.Tensor, gate_up_N2IH: torch.Tensor, down_NHI: torch.Tensor
    ) -> list[Callable[[], None]]:
        """What `unpack` does, prepared for this memory, to be called whenever its contents have changed."""
        if not self.width:
            return []
        count, here = len(packed_NB), slice(self.begin, self.begin + self.width)
        cut = self.gate_up_bytes
        gate_up = packed_NB[:, :cut].unflatten(1, (self.width // ROWS, 2, -1)).transpose(1, 2)
        down = packed_NB[:, cut : cut + self.down_bytes].unflatten(1, (padded(self.hidden, ROWS) // ROWS, -1))
        return [
            self._unpacker(gate_up, gate_up_N2IH[:count, :, here].unflatten(2, (-1, ROWS))),
            self._unpacker(down, down_NHI[:count, :, here].unflatten(1, (-1, ROWS))),
        ]

    def _unpacker(self, blocks: torch.Tensor, rows: torch.Tensor) -> Callable[[], None]:
        """From blocks (…, bytes) to rows (…, 16, K)."""
        if blocks.is_cuda:
            from kt_sglang.prompts.unpack_kernels import unpacker

            return unpacker(self.number_format, blocks, rows)
        return partial(_IN_TORCH[self.number_format], blocks, rows)


def shards_of(number_format: str, hidden: int, intermediate: int, groups: int) -> list[Shard]:
    """One per pool group; some may be empty."""
    steps = padded(intermediate) // STEP
    edges = [steps * group // groups * STEP for group in range(groups + 1)]
    return [Shard(number_format, hidden, a, b - a) for a, b in itertools.pairwise(edges)]


def piece_bytes(shards: Sequence[Shard], experts: int) -> int:
    """Bytes of so many packed experts."""
    return experts * sum(shard.expert_bytes for shard in shards)


def _bf16(blocks: torch.Tensor, rows: torch.Tensor) -> None:
    words = blocks.view(torch.int32).unflatten(-1, (-1, ROWS))
    rows.view(torch.int32).copy_(words.transpose(-1, -2))


def _int8(blocks: torch.Tensor, rows: torch.Tensor) -> None:
    inputs = rows.shape[-1]
    values = blocks[..., : inputs * ROWS].unflatten(-1, (-1, ROWS, 4)).transpose(-2, -3).flatten(-2)
    scales = blocks[..., inputs * ROWS :].view(torch.float32)
    rows.copy_((values.float() - 128) * scales.unsqueeze(-1))


def _int4(blocks: torch.Tensor, rows: torch.Tensor) -> None:
    inputs = rows.shape[-1]
    both = blocks[..., : inputs * ROWS // 2].unflatten(-1, (-1, 4, ROWS, 4))  # group, word, row, byte
    both = both.movedim(-2, -4).flatten(-2)  # row, group, byte: of input i low, of input 16 + i high
    values = torch.stack((both & 15, both >> 4), dim=-2).flatten(-2).float() - 8
    scales = blocks[..., inputs * ROWS // 2 :].view(torch.bfloat16).unflatten(-1, (-1, ROWS)).transpose(-1, -2)
    rows.copy_((values * scales.float().unsqueeze(-1)).flatten(-2))


_IN_TORCH = {"bf16": _bf16, "int8": _int8, "int4": _int4}
