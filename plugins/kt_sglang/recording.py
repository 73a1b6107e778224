"""Counts how often each routed expert is chosen, into the file that kt.record_experts names.

Written while the server runs, at most once a second: a scheduler is ended without being asked.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from kt_model.contract import RECORD_EXPERTS
from kt_model.expert_profile import write_profile

EVERY_S = 1.0
_counts: dict[int, torch.Tensor] = {}
_written = {"at_s": 0.0}


def batch_ran(layer: int, ids_TK: torch.Tensor, num_experts: int) -> None:
    """Count one batch of one layer; ids_TK lie on the host, negative ones were not chosen."""
    path = os.environ.get(RECORD_EXPERTS)
    if not path:
        return
    found = torch.bincount(ids_TK[ids_TK >= 0].long(), minlength=num_experts)
    _counts[layer] = _counts.get(layer, 0) + found
    now_s = time.monotonic()
    if layer == max(_counts) and now_s - _written["at_s"] >= EVERY_S:
        _written["at_s"] = now_s
        write_profile(Path(path), {each: _counts[each].tolist() for each in sorted(_counts)})
