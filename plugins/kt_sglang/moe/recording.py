"""Counts how often each routed expert is chosen, into the file that kt.record_experts names.

Written while the server runs, at most once a second: a scheduler is killed without warning.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

import kt_kernels
from kt_model.contract import RECORD_EXPERTS
from kt_model.expert_profile import write_profile

EVERY_S = 1.0
_counts: dict[int, torch.Tensor] = {}
_replayed: dict[int, kt_kernels.HostRecord] = {}
_written = {"at_s": 0.0}


def layer_loaded(layer: int, record: kt_kernels.HostRecord, num_experts: int) -> None:
    """Also count what replayed steps choose in this layer."""
    if os.environ.get(RECORD_EXPERTS):
        record.count_experts(num_experts)
        _replayed[layer] = record


def batch_ran(layer: int, ids_TK: torch.Tensor, num_experts: int) -> None:
    """Count one batch of one layer; negative ids were not chosen."""
    if not os.environ.get(RECORD_EXPERTS):
        return
    found = torch.bincount(ids_TK[ids_TK >= 0].long().cpu(), minlength=num_experts)
    _counts[layer] = _counts.get(layer, 0) + found
    if layer == max(_counts):
        step_ran()


def step_ran() -> None:
    """All layers have counted a batch."""
    path, now_s = os.environ.get(RECORD_EXPERTS), time.monotonic()
    if path and now_s - _written["at_s"] >= EVERY_S:
        _written["at_s"] = now_s
        write_profile(Path(path), {layer: _counted(layer) for layer in sorted({*_counts, *_replayed})})


def _counted(layer: int) -> list[int]:
    eager = _counts[layer].tolist() if layer in _counts else []
    replayed = _replayed[layer].expert_counts() if layer in _replayed else []
    return [sum(both) for both in zip(eager, replayed, strict=True)] if eager and replayed else eager or replayed
