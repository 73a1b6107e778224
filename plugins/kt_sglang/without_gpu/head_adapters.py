"""Adapters on the output head under the torch_native LoRA backend.

Trigger: a prefill passes one row per prompt to the head, or those whose logprobs are requested, but torch_native uses
the whole prompts' lengths as segments: in a batch with several prompts, the first prompt's adapter (or none) is used
for every row, and first tokens of the base and of other adapters are silently wrong. Safe because the rows are counted
by SGLang's own functions, as in its other backends. Remove when lora/backend/torch_backend.py sets lm_head_batch_info
and uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch


def after_prepare_lora_batch(
    result: Any, backend: Any, forward_batch: Any, weight_indices: list[int], *_: Any, **__: Any
) -> Any:
    """AFTER hook of `TorchNativeLoRABackend.prepare_lora_batch`: computes the head's rows, for one or more passes."""
    from sglang.srt.lora.utils import get_lm_head_pruned_lens

    lengths = get_lm_head_pruned_lens(forward_batch)
    backend.lm_head_batch_info = backend.lm_head_pass_batch_infos = None
    if lengths is None:
        return result
    backend.lm_head_batch_info = _segments(backend.batch_info, weight_indices, lengths)
    passes = backend._get_lm_head_pass_segments(weight_indices, lengths)
    if passes is not None:
        backend.lm_head_pass_batch_infos = [_segments(backend.batch_info, *one) for one in passes]
    return result


def around_apply_lora(original: Callable[..., Any], head: Any, base_output: Any, hidden_states: torch.Tensor) -> Any:
    """AROUND hook of `ParallelLMHeadWithLoRA.apply_lora`: torch_native's steps read the segments from the backend."""
    backend = head.lora_backend
    own = head._get_lm_head_batch_info(hidden_states.shape[0])
    if own is None:
        return original(head, base_output, hidden_states)
    whole, backend.batch_info = backend.batch_info, own
    try:
        return original(head, base_output, hidden_states)
    finally:
        backend.batch_info = whole


def _segments(batch_info: Any, adapters: Sequence[int], lengths: Sequence[int]) -> Any:
    """The batch information for so many rows of each adapter's slot, one after another."""
    rows, slots = torch.tensor(lengths, dtype=torch.int32), torch.tensor(adapters, dtype=torch.int32)
    ends = torch.cat([torch.zeros(1, dtype=torch.int32), rows.cumsum(0, dtype=torch.int32)])
    on_host = {"seg_lens_cpu": rows, "seg_indptr_cpu": ends, "weight_indices_cpu": slots}
    return replace(
        batch_info,
        use_cuda_graph=False,
        bs=len(lengths),
        num_segments=len(lengths),
        max_len=max(lengths),
        seg_lens=rows,
        seg_indptr=ends,
        weight_indices=slots,
        expected_tokens=sum(lengths),
        **on_host,
    )
