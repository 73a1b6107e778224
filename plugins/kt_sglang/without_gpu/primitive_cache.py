"""Bounds what torch's library for CPU matrices, oneDNN, keeps of the shapes that it has multiplied.

Trigger: for every shape it generates code, about a quarter of a MiB, and keeps that of the last 1024; torch keeps as
many again. A batch's number of tokens is part of the shape, so prompts of other lengths grow a server by a GiB. Safe
because what is dropped is generated again, in one to two milliseconds, and a decode step has few shapes: a row count
and a layer's kinds of projections. torch's own cache saves no time beside oneDNN's (20 µs a call with either size).
Remove when shapes are generated without the number of rows.
"""

import os

CAPACITY = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "1"}
"""In shapes: of oneDNN's cache, and of torch's in front of it."""


def bound() -> None:
    """Before torch is used; what the user has set stays."""
    for variable, shapes in CAPACITY.items():
        os.environ.setdefault(variable, shapes)
