"""GPU buffers for experts that are streamed there for long prompts; the plan and the server size them alike."""

from __future__ import annotations

from dataclasses import dataclass

MIB, GIB = 1 << 20, 1 << 30
USUAL_BYTES = GIB
MOST_PIECE_BYTES = 160 * MIB
"""Bytes of a packed piece: larger ones are copied no faster, and a layer waits for its first one."""
MOST_BUFFERS, FEWEST_BUFFERS = 4, 2
"""Pieces in flight or waiting: so many are copied while a layer's attention runs."""
MOST_COMBINED_BYTES = 256 * MIB
"""Bytes of expert outputs that are gathered at a time for summation."""


@dataclass(frozen=True)
class Buffers:
    """`count` packed pieces of `experts` each, and one unpacked."""

    experts: int
    count: int
    bytes: int


def buffers(packed_expert: int, unpacked_expert: int, experts: int, most_bytes: int | None = None) -> Buffers | None:
    """Sizes are in bytes of one expert, packed and as padded bfloat16; None if not even two single experts fit.
    most_bytes: if not given, the minimum that works, and up to USUAL_BYTES."""
    bound = USUAL_BYTES if most_bytes is None else most_bytes
    for count in range(MOST_BUFFERS, FEWEST_BUFFERS - 1, -1):
        each = count * packed_expert + unpacked_expert
        fewest = 1 if most_bytes is None and count == FEWEST_BUFFERS else bound // each
        piece = min(fewest, max(MOST_PIECE_BYTES // packed_expert, 1), -(-experts // 2))
        if piece > 0:
            return Buffers(piece, count, piece * each)
    return None
