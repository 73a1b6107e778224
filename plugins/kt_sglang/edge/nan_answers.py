"""NaN in answers, which JSON cannot represent: log probabilities of a prompt, embeddings. Sampled tokens are handled in
nan_guard.py.

Trigger: weights or an adapter that give NaN for a request that samples nothing. Safe because such an answer has nothing
that a client could use. Remove when SGLang ends such requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

from kt_sglang.sampling.nan_guard import MESSAGE


async def around_handle_abort_finish_reason(
    original: Callable[..., Any], manager: Any, out: dict[str, Any], *others: Any
) -> Any:
    """AROUND hook of `TokenizerManager._handle_abort_finish_reason`, called for each complete answer: one with NaN ends
    like an abort by the scheduler."""
    if has_nan(out):
        status = HTTPStatus.INTERNAL_SERVER_ERROR
        out["meta_info"]["finish_reason"] = {"type": "abort", "message": MESSAGE, "status_code": status}
        for name in _logprobs(out["meta_info"]):
            del out["meta_info"][name]
    return await original(manager, out, *others)


def has_nan(out: dict[str, Any]) -> bool:
    """Whether any number of the answer is NaN or infinite."""
    meta = out["meta_info"]
    parts = [out.get("embedding"), *(meta[name] for name in _logprobs(meta))]
    return any(value != value for part in parts for value in _flat(part))


def _logprobs(meta: dict[str, Any]) -> list[str]:
    """Keys of log probabilities: nested lists of (value, token, text), or flat ones."""
    return [name for name in meta if "logprobs" in name]


def _flat(values: Any) -> Iterator[Any]:
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        yield values
        return
    for value in values:
        yield from _flat(value)
