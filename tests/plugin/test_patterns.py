"""Patterns of requests are searched for a bounded time; what clients see is shown by tests/edge/test_served.py."""

from __future__ import annotations

import re
import time

import pytest

from kt_sglang.sampling.patterns import BOUNDED, LONGEST_S

TEXT = "It is 12:30 in Paris.\nGood bye!"


@pytest.mark.parametrize(
    "pattern", [r"\d+:\d+", r"(?i)PARIS\.$", r"^Good", r"(?m)^Good", "nothing", "bye!$", r"\bin\b"]
)
def test_ordinary_patterns_find_what_re_finds(pattern: str) -> None:
    expected, found = re.search(pattern, TEXT), BOUNDED.search(pattern, TEXT)
    assert (found and found.span()) == (expected and expected.span())


def test_a_pattern_without_an_end_is_an_error_that_sglang_knows() -> None:
    begun = time.process_time()
    with pytest.raises(BOUNDED.error, match="it takes more than"):
        BOUNDED.search("(a|a)+$", "a" * 60 + "b")
    assert time.process_time() - begun < 20 * LONGEST_S
    with pytest.raises(re.error):
        BOUNDED.search("(", TEXT)
