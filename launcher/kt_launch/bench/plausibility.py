"""Implausible results of a load: they are measured again, and marked as not measured if they stay implausible."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kt_model.errors import BenchFailed

TRIES = 3
LEAST_MS = 0.1
"""Per token of any model served here; a lower value means that the answer came in one piece, which measures nothing."""
RATES = ("duration_s", "requests_per_s", "output_tokens_per_s", "total_tokens_per_s")
TIMES = ("ttft_ms", "tpot_ms", "itl_ms", "latency_ms")
WHOLE, FIRST = "latency_ms", "ttft_ms"


def doubts(load: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, reason) for each implausible number of a load."""
    for name in RATES:
        if not (math.isfinite(load[name]) and load[name] > 0):
            yield name, f"{load[name]:g}"
    for name in TIMES:
        found = load[name]
        if found is None:
            yield name, "the answers came in one piece"
        elif not all(math.isfinite(value) and value >= 0 for value in found.values()):
            yield name, "no finite time"
        elif found["median"] < LEAST_MS:
            yield name, f"{found['median']:g} ms a token is less than {LEAST_MS} ms"
    if load[FIRST] and load[WHOLE] and load[FIRST]["median"] > load[WHOLE]["median"]:
        yield FIRST, "the first token came after the last one"


def measure_again(run: Callable[[], dict[str, Any]], say: Callable[[str], None]) -> dict[str, Any]:
    """The first of a few runs with plausible numbers; else the last one, without the implausible numbers, which are
    listed under `not_measured`. Raises BenchFailed if not even rates are left."""
    for left in reversed(range(TRIES)):
        found = run()
        doubted = dict(doubts(found)) if found["completed"] else {}
        if not doubted:
            return found
        why = "; ".join(f"{name}: {reason}" for name, reason in doubted.items())
        say(f"implausible ({why}); {'measuring again' if left else 'not measured'}")
    if wrong := [name for name in doubted if name in RATES]:
        raise BenchFailed("bench", f"{wrong[0]} is {found[wrong[0]]:g} after {TRIES} tries", "Measure longer answers.")
    return {**found, **dict.fromkeys(doubted), "not_measured": doubted}
