"""Whole embeddings beside the low-rank pairs: PEFT also saves them when it adapts embed_tokens or lm_head. If they
equal the base's, they are ignored; if they were trained or resized, the adapter is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kt_model.checkpoint import Checkpoint
from kt_model.importer.mistakes import Mistakes
from kt_model.importer.names import UNKNOWN_MODULE
from kt_model.tensors.stored import Float32, Stored, round_to_bfloat16

if TYPE_CHECKING:
    from kt_model.experts import ExpertSource

ROWS = 4096
"""Compared at once."""
CHANGED = "embeddings that are not the base's, but trained or resized as a whole"
FIX = "Train low-rank pairs on them, or merge the adapter into its base with PEFT."


def check_copies(copies: Mapping[str, tuple[str, Stored]], base: Checkpoint, mistakes: Mistakes) -> None:
    """`copies`: key -> module (embed_tokens, lm_head) and tensor. Those that differ from the base are added to
    `mistakes`."""
    from kt_model.experts import ExpertSource

    source = ExpertSource(base)
    for key, (module, stored) in copies.items():
        name = next((name for name in _names(module) if name in base.tensors), None)
        if name is None:
            mistakes.add(UNKNOWN_MODULE, key, f"Choose the base that it was trained on; this is {base.path}.")
        elif stored.shape != base.tensors[name].shape or not _is_same(source, name, stored):
            mistakes.add(CHANGED, key, FIX)


def _names(module: str) -> tuple[str, ...]:
    """The base's tensor; a tied lm_head is the embedding."""
    return (
        f"model.{module}.weight",
        f"{module}.weight",
        *(["model.embed_tokens.weight"] if module == "lm_head" else []),
    )


def _is_same(source: ExpertSource, name: str, stored: Stored) -> bool:
    for start in range(0, stored.shape[0], ROWS):
        rows = range(start, min(start + ROWS, stored.shape[0]))
        if not np.array_equal(stored.array[rows.start : rows.stop], _as(source.float32(name, rows), stored.dtype)):
            return False
        stored.forget()
    return True


def _as(values: Float32, dtype: str) -> npt.NDArray[np.generic]:
    """The base's values in the adapter's type, with the rounding of saving it."""
    if dtype == "BF16":
        return round_to_bfloat16(np.ascontiguousarray(values))
    return values.astype(np.float16) if dtype == "F16" else values
