"""GPU buffers for experts that are streamed there for long prompts; the plan and the server size them alike."""

from __future__ import annotations

from dataclasses import dataclass

from kt_model.units import GIB, MIB

USUAL_BYTES = GIB * 3 // 2
MOST_PIECE_BYTES = 160 * MIB
"""Bytes of a packed piece: larger ones are copied no faster, and a layer waits for its first one."""
MOST_BUFFERS, ENOUGH_BUFFERS, FEWEST_BUFFERS = 8, 4, 2
"""Pieces in flight or waiting: so many are copied while a layer's attention runs, at best all of the next layer."""
MOST_FACTOR_BYTES = 64 * MIB
"""Bytes of adapter factors that are arranged at a time; those of one piece may be more."""


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
    wanted = min(max(MOST_PIECE_BYTES // packed_expert, 1), -(-experts // 2))
    for count in range(min(MOST_BUFFERS, -(-experts // wanted)), ENOUGH_BUFFERS, -1):
        if wanted * (count * packed_expert + unpacked_expert) <= bound:
            return Buffers(wanted, count, wanted * (count * packed_expert + unpacked_expert))
    for count in range(max(min(ENOUGH_BUFFERS, -(-experts // wanted)), FEWEST_BUFFERS), FEWEST_BUFFERS - 1, -1):
        each = count * packed_expert + unpacked_expert
        at_least = 1 if most_bytes is None and count == FEWEST_BUFFERS else 0
        piece = min(max(bound // each, at_least), wanted)
        if piece > 0:
            return Buffers(piece, count, piece * each)
    return None
