"""Imports without Python's cyclic garbage collector: torch, transformers and SGLang make a million objects that stay,
and looking through them again and again is a fifth of the time that importing them takes.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Within the block nothing is collected, and what there is at its end is never looked at again (`gc.freeze`), which
    also keeps it in pages that forked processes share. For the main thread of a process, around its imports."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
