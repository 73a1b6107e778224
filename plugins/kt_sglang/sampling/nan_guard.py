"""A request whose computation gives no finite numbers ends with an error, and the rest of its batch goes on.

Trigger: finite weights or adapters whose products overflow, so that a row of logits has NaN or infinity, or a grammar
that permits no token. SGLang goes on with a meaningless token, or its scheduler ends, if another request of the batch
has top_k, top_p or min_p. Safe because finite rows are left alone, and SGLang itself supports requests that end in the
middle of a batch. Remove when SGLang ends them. NaN in answers without sampling is handled at the edge
(edge/nan_answers.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

import torch

from kt_sglang.decode.captured import wait_for

MESSAGE = (
    "the model's logits are NaN or infinite for this request, so there is no next token: weights or adapter compute "
    "values beyond the range of bfloat16. Other requests are not affected."
)
NO_TOKEN = (
    "the grammar of the request (json_schema, regex, ebnf or structural_tag) permits no token here, as one does that "
    "refers to itself without an end, or that ends before min_tokens."
)
UNUSABLE = "kt_unusable_rows"
"""Attribute of SGLang's objects: an int8 for each row of logits (unusable_rows), on their device or being copied to the
host."""
FORBIDDEN = 2
log = logging.getLogger(__name__)


def around_sample(original: Callable[..., Any], sampler: Any, logits_output: Any, *others: Any, **more: Any) -> Any:
    """AROUND hook of `Sampler.forward` and `Sampler.compute_logprobs_only`: marks unusable rows, whose logits become
    zeros, from which any token can be sampled. Does not synchronize with the device. The logits are SGLang's to change:
    it makes them probabilities in place."""
    logits_BV = logits_output.next_token_logits
    if logits_BV is not None and logits_BV.ndim == 2 and logits_BV.numel():
        setattr(logits_output, UNUSABLE, rows_B := unusable_rows(logits_BV))
        if rows_B.is_cuda or rows_B.any():
            logits_BV.masked_fill_(rows_B.bool()[:, None], 0)
    return original(sampler, logits_output, *others, **more)


def unusable_rows(logits_BV: torch.Tensor) -> torch.Tensor:
    """(B,) int8: 1 if no token can be sampled from the row, FORBIDDEN if every token is forbidden. Minus infinity alone
    is no fault: it forbids a token."""
    most_B = logits_BV.amax(dim=-1)
    return (~torch.isfinite(most_B)).to(torch.int8) + (most_B == -torch.inf)


def around_copy_to_cpu(original: Callable[..., Any], result: Any, *others: Any, **more: Any) -> Any:
    """AROUND hook of `GenerationBatchResult.copy_to_cpu`: the marks are copied too, before its event is recorded."""
    rows_B = getattr(result.logits_output, UNUSABLE, None)
    if rows_B is not None:
        from sglang.srt.utils.common import async_d2h

        setattr(result, UNUSABLE, async_d2h(rows_B))
        delattr(result.logits_output, UNUSABLE)
    return original(result, *others, **more)


def around_process_prefill(original: Callable[..., Any], processor: Any, batch: Any, result: Any) -> Any:
    """AROUND hook of `SchedulerBatchResultProcessor.process_batch_result_prefill`: SGLang itself drops the output of
    requests with a finish reason."""
    for request, why in unusable_requests(batch, result):
        if request.inflight_middle_chunks <= 0 and request.discard_output_reason is None:
            request.discard_output_reason = why
    return original(processor, batch, result)


def around_process_decode(original: Callable[..., Any], processor: Any, batch: Any, result: Any) -> Any:
    """AROUND hook of `SchedulerBatchResultProcessor.process_batch_result_decode`: the last token of such requests is
    not sent."""
    for request, why in unusable_requests(batch, result):
        if request.to_finish is None:
            request.to_finish = why
        request.finished_len = len(request.output_ids)
    return original(processor, batch, result)


def around_finish_state_updated(original: Callable[..., Any], processor: Any, request: Any, *others: Any) -> Any:
    """AROUND hook of `SchedulerBatchResultProcessor._handle_finish_state_updated_req`: nothing of such a request is
    cached for others with the same prefix."""
    if getattr(request.finished_reason, "message", None) in (MESSAGE, NO_TOKEN):
        return processor._handle_sampling_mask_abort(request)
    return original(processor, request, *others)


def unusable_requests(batch: Any, result: Any) -> Iterator[tuple[Any, Any]]:
    """(request, reason) of the requests to end. Only if each request has one row: not in speculation, nor beam
    search."""
    rows_B = getattr(result, UNUSABLE, getattr(result.logits_output, UNUSABLE, None))
    if rows_B is None or len(rows_B) != len(batch.reqs):
        return
    if result.copy_done is not None or rows_B.is_cuda:
        wait_for(result.copy_done)
    for row in rows_B.nonzero().flatten().tolist():
        request = batch.reqs[row]
        if request.beam_group is None and not (request.finished() or request.is_retracted):
            why = reason(forbidden=request.grammar is not None and bool(rows_B[row] == FORBIDDEN))
            log.warning("request %s: %s", request.rid, why.message)
            yield request, why


def reason(forbidden: bool) -> Any:
    """Why it ends, as told to its client. forbidden: by the request's own grammar."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    if forbidden:
        return FINISH_ABORT(NO_TOKEN, HTTPStatus.BAD_REQUEST, "BadRequestError")
    return FINISH_ABORT(MESSAGE, HTTPStatus.INTERNAL_SERVER_ERROR, "NonFiniteLogits")
