"""Penalties of a request (frequency, presence, repetition) and min_tokens, counted over its whole answer so far.

Trigger: a request with one of them. SGLang prepares a step before it knows which token the last one chose: its
penalties leave out the newest token, so that the same token may come twice whatever the penalty, and count the last
token of the prompt instead. It also forgets the tokens of a request that it takes out of the batch for a while. Safe
because batches without penalties, and speculative decoding, are left to SGLang; the newest token is counted on the
device, in the buffers that this step alone has. Remove when SGLang counts them.

Shapes: B rows of a batch, V tokens, L rows whose newest token is on the device only, N tokens that are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

COUNTED = "kt_counted"
"""Attribute of a request: how many tokens of its answer are in the penalties' buffers."""
NEWEST = "kt_newest"
"""Attribute of SGLang's penalties: the rows whose newest token has not come from the device; of a step's
SamplingBatchInfo: what is to be counted for them."""


@dataclass
class Newest:
    """What the newest token of some rows changes. (L,) each, float32, if a row of the batch has such a penalty."""

    rows_L: torch.Tensor
    frequency_L: torch.Tensor | None = None
    presence_L: torch.Tensor | None = None
    present_LV: torch.Tensor | None = None
    """Bool: the tokens whose presence has been counted."""
    repetition_L: torch.Tensor | None = None
    is_counted: bool = False


def after_from_schedule_batch(info: Any, cls: Any, batch: Any, *others: Any, **more: Any) -> Any:
    """AFTER hook of `SamplingBatchInfo.from_schedule_batch`, which begins with empty buffers."""
    for request in batch.reqs:
        setattr(request, COUNTED, 0)
    if info.penalizer_orchestrator.is_required:
        count(info.penalizer_orchestrator, batch.reqs, [len(each.output_ids) for each in batch.reqs])
    return info


def around_cumulate(original: Callable[..., Any], batch: Any) -> None:
    """AROUND hook of `ScheduleBatch.cumulate_penalty_output_tokens`, before each step of decoding. The step before has
    read seq_lens_cpu tokens, and has chosen one more."""
    if not batch.spec_algorithm.is_none():
        original(batch)
        return
    penalties, lengths = batch.sampling_info.penalizer_orchestrator, batch.seq_lens_cpu.tolist()
    chosen = [length + 1 - len(each.origin_input_ids) for length, each in zip(lengths, batch.reqs, strict=True)]
    count(penalties, batch.reqs, chosen)
    setattr(penalties, NEWEST, [row for row, each in enumerate(batch.reqs) if chosen[row] > len(each.output_ids)])


def count(penalties: Any, requests: Sequence[Any], chosen: Sequence[int]) -> None:
    """Count the tokens that are known and have not been counted. chosen: how many each request has, known or not."""
    rows: list[int] = []
    tokens: list[int] = []
    for row, request in enumerate(requests):
        new = request.output_ids[getattr(request, COUNTED, 0) :]
        rows += [row] * len(new)
        tokens += new
        setattr(request, COUNTED, len(request.output_ids))
    at_N = _tensor(rows, penalties), _tensor(tokens, penalties)
    frequency, presence, repetition, least = prepared(penalties)
    if frequency is not None:
        values_N = frequency.frequency_penalties[at_N[0], 0]
        frequency.cumulated_frequency_penalties.index_put_(at_N, values_N, accumulate=True)
    if presence is not None:
        presence.cumulated_presence_penalties.index_put_(at_N, presence.presence_penalties[at_N[0], 0])
    if repetition is not None:
        repetition.cumulated_repetition_penalties.index_put_(at_N, repetition.repetition_penalties[at_N[0], 0])
    if least is not None:
        least.len_output_tokens.copy_(_tensor(list(chosen), penalties).unsqueeze(1))


def prepared(penalties: Any) -> tuple[Any, Any, Any, Any]:
    """SGLang's objects for frequency, presence, repetition and min_tokens; None where no request has one."""
    from sglang.srt.sampling import penaltylib

    kinds = (
        penaltylib.BatchedFrequencyPenalizer,
        penaltylib.BatchedPresencePenalizer,
        penaltylib.BatchedRepetitionPenalizer,
        penaltylib.BatchedMinNewTokensPenalizer,
    )
    found = [penalties.penalizers.get(kind) for kind in kinds]
    first, second, third, fourth = (each if each is not None and each.is_prepared() else None for each in found)
    return first, second, third, fourth


def after_copy_for_forward(copy: Any, info: Any) -> Any:
    """AFTER hook of `SamplingBatchInfo.copy_for_forward`: the step keeps what its newest tokens change."""
    penalties = info.penalizer_orchestrator
    rows = penalties.__dict__.pop(NEWEST, None) if penalties is not None else None
    if not rows or not penalties.is_required:
        return copy
    newest = Newest(rows_L := _tensor(rows, penalties))
    frequency, presence, repetition, _ = prepared(penalties)
    if frequency is not None:
        newest.frequency_L = frequency.frequency_penalties[rows_L, 0]
    if presence is not None:
        newest.presence_L = presence.presence_penalties[rows_L, 0]
        newest.present_LV = presence.cumulated_presence_penalties[rows_L] != 0
    if repetition is not None:
        newest.repetition_L = repetition.repetition_penalties[rows_L, 0]
    setattr(copy, NEWEST, newest)
    return copy


def around_sample(original: Callable[..., Any], runner: Any, output: Any, batch: Any) -> Any:
    """AROUND hook of `ModelRunner.sample`, where the newest tokens are: a step of decoding reads them."""
    newest = getattr(batch.sampling_info, NEWEST, None)
    if newest is not None and not newest.is_counted and batch.forward_mode.is_decode():
        count_newest(newest, batch.input_ids, batch.sampling_info)
    return original(runner, output, batch)


def count_newest(newest: Newest, tokens_B: torch.Tensor, info: Any) -> None:
    """Into the buffers that SGLang adds to the logits of this step, and multiplies them by. What was taken from the
    penalties stays with `info`, since a device may read it later."""
    newest.is_counted = True
    tokens_L = tokens_B[newest.rows_L].long()
    at_L = (newest.rows_L, tokens_L)
    if newest.frequency_L is not None:
        info.acc_additive_penalties.index_put_(at_L, -newest.frequency_L, accumulate=True)
    if newest.presence_L is not None and newest.present_LV is not None:
        is_new_L = ~newest.present_LV.gather(1, tokens_L[:, None])[:, 0]
        info.acc_additive_penalties.index_put_(at_L, -newest.presence_L * is_new_L, accumulate=True)
    if newest.repetition_L is not None:
        info.acc_scaling_penalties.index_put_(at_L, newest.repetition_L)


def _tensor(numbers: list[int], penalties: Any) -> torch.Tensor:
    """On the penalties' device, int64, without waiting for it."""
    made = torch.tensor(numbers, dtype=torch.int64)
    if torch.device(penalties.device).type == "cuda":
        made = made.pin_memory()
    return made.to(penalties.device, non_blocking=True)
