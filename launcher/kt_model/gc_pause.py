"""Pauses Python's cyclic garbage collector during imports: torch, transformers and SGLang create a million permanent
objects, and scanning them repeatedly takes a fifth of the import time.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Within the block nothing is collected, and objects that exist at its end are never scanned again (`gc.freeze`),
    which also keeps them in pages that forked processes share. For a process's main thread, around its imports."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
