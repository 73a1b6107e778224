"""Experts that an earlier start packed are mapped from the packed cache; those packed by this start are written there
by a background thread, while the server already runs. Files and keys: kt_model.weights.packed.

Any failure of the cache is logged, and the experts are packed as if there were no cache.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

from kt_model.contract import PACKED_CACHE, PackedCacheReport
from kt_model.digests import SETTLED_NS, Stamps
from kt_model.errors import LaunchError
from kt_model.weights.packed import (
    CacheKey,
    Entry,
    PackedLayer,
    discard,
    find_entry,
    remember_digests,
    write_entry,
)
from kt_sglang.moe.layers import LAYERS, CpuExperts

logger = logging.getLogger(__name__)
LEAST_PRIORITY = 19
_before: dict[CacheKey, Stamps] = {}
"""Stamps of the weights' files before they were loaded."""
_state: PackedCacheReport = {"state": "off", "entry": None, "problem": None}


@cache
def entry_of(cache_key: CacheKey) -> Entry | None:
    """The sound entry, or None; an unsound one is logged and removed."""
    if os.environ.get(PACKED_CACHE) == "off":
        return None
    _tell("none", None)
    with contextlib.suppress(OSError, LaunchError):
        _before[cache_key] = cache_key.stamps()
    try:
        entry = find_entry(cache_key)
    except (LaunchError, OSError, ValueError) as failure:
        _tell("unsound", None, f"{failure} It will be written again.")
        with contextlib.suppress(OSError, LaunchError, ValueError):
            discard(cache_key)
        return None
    if entry is not None:
        entry.used()
        _tell("mapped", entry.path)
    return entry


def refuse(cache_key: CacheKey, layer: int, failure: Exception) -> None:
    """The kernels reject this layer's stored form: it is packed again, and the next start rewrites the entry."""
    _tell("unsound", None, f"layer {layer}: {failure}")
    with contextlib.suppress(OSError, LaunchError, ValueError):
        discard(cache_key)


def after_load_model(result: Any, *_: Any, **__: Any) -> Any:
    """AFTER hook of `ModelRunner.load_model`: write what was packed, unless it came from the cache."""
    layers = [weights for _, weights in sorted(LAYERS.weights.items()) if weights.is_complete]
    if layers and os.environ.get(PACKED_CACHE) != "off" and not any(each.mapped for each in layers):
        threading.Thread(target=_keep, args=[layers], name="packed-cache", daemon=True).start()
    return result


def _keep(layers: list[CpuExperts]) -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LEAST_PRIORITY)
    began_s = time.monotonic()
    try:
        entry = write_entry(
            layers[0].cache_key,
            [PackedLayer(each.layer_id, each.moe.intermediate_size, each.moe.packed_shards()) for each in layers],
            before=_before.get(layers[0].cache_key),
        )
    except (LaunchError, OSError, ValueError) as failure:
        _tell("not written", None, f"{failure} The next start packs the experts again.")
        return
    took_s = time.monotonic() - began_s
    logger.info("packed cache: wrote %s, %.2f GiB in %.1f s", entry.path, entry.bytes / 2**30, took_s)
    time.sleep(SETTLED_NS / 1e9 + 1)
    with contextlib.suppress(OSError):
        remember_digests(entry)
    _tell("written", entry.path)


def _tell(state: str, entry: Path | None, problem: str | None = None) -> None:
    _state.update({"state": state, "entry": None if entry is None else str(entry), "problem": problem})
    if problem:
        logger.warning("packed cache: %s", problem)


def report() -> PackedCacheReport:
    """The state of the cache entry."""
    return {**_state}
