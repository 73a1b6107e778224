"""Patterns of requests (`stop_regex`) are searched for a bounded time.

Trigger: SGLang looks for them in its scheduler's loop, after each token, by Python's `re`, which takes years for
`(a+)+b` in forty letters a: nobody is answered any more. Safe because the package `regex` finds what `re` finds, and a
pattern that takes too long ends its own request, as SGLang ends one that is not valid. Remove when SGLang's search is
linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import regex

LONGEST_S = 0.1
"""Time limit of one search, in the process's CPU time. Ordinary ones take microseconds."""


class BoundedPatterns:
    """The module `re` with a bounded search."""

    def __getattr__(self, name: str) -> Any:
        return getattr(re, name)

    @staticmethod
    def search(pattern: str, text: str) -> Any:
        """As re.search. Raises re.error, also for a search that exceeds the time limit."""
        try:
            return regex.search(pattern, text, timeout=LONGEST_S)
        except TimeoutError as failure:
            raise re.error(f"it takes more than {LONGEST_S * 1000:g} ms to be searched") from failure
        except regex.error as failure:
            raise re.error(str(failure)) from failure


BOUNDED = BoundedPatterns()


def around_check_str_based_finish(original: Callable[..., Any], request: Any, *others: Any) -> Any:
    """AROUND hook of `Req._check_str_based_finish`, in whose module `re` is replaced."""
    from sglang.srt.managers import schedule_batch

    schedule_batch.re = BOUNDED
    return original(request, *others)
