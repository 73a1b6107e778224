"""How much of the context a request may fill; tests/edge/test_served.py fills it on a server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kt_sglang.sampling.whole_context import around_get_worker_info


def bounds(context: int, cache: int, drafts: bool = False, blocks: Any = None) -> tuple[int, int]:
    """max_req_len and max_req_input_len."""
    runner = SimpleNamespace(
        effective_logical_max_total_num_tokens=cache, spec_algorithm=SimpleNamespace(is_none=lambda: not drafts)
    )
    worker = SimpleNamespace(
        model_config=SimpleNamespace(context_len=context), model_runner=runner, dllm_algorithm=blocks
    )
    whole = min(context - 1, cache - 1)
    found = around_get_worker_info(lambda _: (cache, 1, 2, 3, whole, whole - 5, 42, "cpu"), worker)
    assert (found[:4], found[6:]) == ((cache, 1, 2, 3), (42, "cpu"))
    return found[4], found[5]


@pytest.mark.parametrize(
    ("context", "cache", "expected"),
    [
        (4096, 16384, (4097, 4096)),
        (4096, 4102, (4097, 4096)),
        (4096, 4101, (4097, 4095)),
        (4096, 4098, (4097, 4092)),
        (4096, 4097, (4096, 4091)),
        (4096, 4096, (4095, 4090)),
        (4096, 2000, (1999, 1994)),
    ],
)
def test_a_request_may_fill_the_context_and_the_cache_but_for_what_sglang_spares(
    context: int, cache: int, expected: tuple[int, int]
) -> None:
    assert bounds(context, cache) == expected


def test_where_more_is_written_than_answered_sglangs_bounds_are_left() -> None:
    assert bounds(4096, 16384, drafts=True) == bounds(4096, 16384, blocks=object()) == (4095, 4090)
