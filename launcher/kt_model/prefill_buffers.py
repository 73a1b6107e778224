"""Room on a GPU for experts that are brought there for long prompts, the same in the plan and in the server."""

from __future__ import annotations

from dataclasses import dataclass

MIB, GIB = 1 << 20, 1 << 30
USUAL_BYTES = GIB
MOST_PIECE_BYTES = 160 * MIB
"""Of a packed piece: larger ones come no faster, and the first of a layer is waited for."""
MOST_BUFFERS, FEWEST_BUFFERS = 4, 2
"""Pieces that may be on their way or waiting: while the attention of a layer runs, so many of the next come."""
MOST_COMBINED_BYTES = 256 * MIB
"""Of the experts' outputs that are gathered at a time for their sum."""


@dataclass(frozen=True)
class Buffers:
    """`count` packed pieces of `experts` each, and one unpacked."""

    experts: int
    count: int
    bytes: int


def buffers(packed_expert: int, unpacked_expert: int, experts: int, most_bytes: int | None = None) -> Buffers | None:
    """The sizes are bytes of one expert, in the packed layout and as padded bfloat16; None where not even two single
    experts fit. most_bytes: as few as work, and up to USUAL_BYTES, when not given."""
    bound = USUAL_BYTES if most_bytes is None else most_bytes
    for count in range(MOST_BUFFERS, FEWEST_BUFFERS - 1, -1):
        each = count * packed_expert + unpacked_expert
        fewest = 1 if most_bytes is None and count == FEWEST_BUFFERS else bound // each
        piece = min(fewest, max(MOST_PIECE_BYTES // packed_expert, 1), -(-experts // 2))
        if piece > 0:
            return Buffers(piece, count, piece * each)
    return None
