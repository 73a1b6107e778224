"""What ran, reported from inside the scheduler to the launcher on request.

SGLang swallows plugin failures, so the launcher relies on this alone: the classes in place, the experts loaded, the
batches and adapter rows that went through kt_kernels, and one token recomputed in float32 (layers.py, reference.py).
"""

from __future__ import annotations

import os
from typing import Any

import torch

from kt_model.contract import REPORT, Report
from kt_model.redaction import mask_all, secrets_of
from kt_sglang.checkpoint import packed, reading
from kt_sglang.hooks import missing_hooks
from kt_sglang.moe.layers import LAYERS
from kt_sglang.process import outputs
from kt_sglang.prompts.prefill import prefill


def report() -> Report:
    """The scheduler's report: missing hooks (normally none) and one record per layer."""
    return {
        "pid": os.getpid(),
        "cpus": sorted(os.sched_getaffinity(0)),
        "packed_cache": packed.report(),
        "outputs_sent": outputs.sent(),
        "unread_tensors": reading.unread_tensors(),
        "missing_hooks": missing_hooks(),
        "slots": {str(slot): adapter for slot, adapter in LAYERS.slots.items()},
        "checked_adapters": dict(LAYERS.checked),
        "gpu_prefill": own.report() if (own := prefill()) else None,
        "layers": [record.as_dict() for _, record in sorted(LAYERS.records.items())],
        "others": [],
    }


def report_of_all_ranks() -> Report:
    """The report of tensor-parallel rank 0, including those of the others. Every rank takes part: SGLang broadcasts the
    request between the same two batches, and passes on only rank 0's answer."""
    from sglang.srt.distributed import get_tp_group

    own, group = report(), get_tp_group()
    if group.world_size == 1:
        return own
    reports: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(reports, own, group=group.cpu_group)
    return {**own, "others": [each for rank, each in enumerate(reports) if rank != group.rank_in_group]}


def after_get_internal_state(result: Any, *_: Any, **__: Any) -> Any:
    """AFTER hook: adds the report to what `/server_info` returns under `internal_states`, without keys."""
    result.internal_state = {**mask_all(result.internal_state, secrets_of()), REPORT: report_of_all_ranks()}
    return result
