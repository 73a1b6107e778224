"""What ran, as seen from inside the scheduler, given to the launcher on request.

SGLang swallows plugin failures, so the launcher believes only this: the classes in place, the experts loaded, the
batches and adapter rows that went through kt_kernels, and one token recomputed in float32 (layers.py, reference.py).
"""

from __future__ import annotations

import os
from typing import Any

from kt_model.contract import REPORT, Report
from kt_model.redaction import mask_all, secrets_of
from kt_sglang import packed, reading
from kt_sglang.hooks import missing_hooks
from kt_sglang.layers import LAYERS


def report() -> Report:
    """The scheduler's answer: hooks that are missing (should be none) and a record a layer."""
    return {
        "pid": os.getpid(),
        "packed_cache": packed.report(),
        "unread_tensors": reading.unread_tensors(),
        "missing_hooks": missing_hooks(),
        "slots": {str(slot): adapter for slot, adapter in LAYERS.slots.items()},
        "checked_adapters": dict(LAYERS.checked),
        "layers": [record.as_dict() for _, record in sorted(LAYERS.records.items())],
    }


def after_get_internal_state(result: Any, *_: Any, **__: Any) -> Any:
    """AFTER hook: adds the report to what `/server_info` returns under `internal_states`, without keys."""
    result.internal_state = {**mask_all(result.internal_state, secrets_of()), REPORT: report()}
    return result
