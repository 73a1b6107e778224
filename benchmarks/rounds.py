"""Takes turns: in each round every contender computes the same batches, and ratios are taken inside the round."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from cases import Batch
from contenders import Contender

# Shorter calls come after an untimed one, since the turn before has put threads to sleep and filled caches.
WARM_BELOW_S = 0.02
TURN_S = 0.01  # shorter calls are repeated until a turn lasts about that long
MOST_CALLS = 8


@dataclass
class Timing:
    """Mean seconds a call in each round."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        return statistics.median(self.seconds) * 1e3

    @property
    def best_ms(self) -> float:
        return min(self.seconds) * 1e3


@dataclass(frozen=True)
class Ratio:
    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def ratio_of(over: Timing, under: Timing) -> Ratio:
    """Median and quartiles of the ratios of single rounds."""
    values = [o / u for o, u in zip(over.seconds, under.seconds, strict=True)]
    if len(values) == 1:
        return Ratio(*values * 3)
    return Ratio(*statistics.quantiles(values, n=4, method="inclusive"))


def take_turn(contender: Contender, batches: Sequence[Batch], round_number: int, expected_s: float) -> float:
    """Mean seconds a call, over as many calls as `expected_s`, the same for all contenders, leaves room for."""
    calls = min(MOST_CALLS, max(1, round(TURN_S / max(expected_s, 1e-6))))
    first = round_number * MOST_CALLS
    if expected_s < WARM_BELOW_S:
        number = (first + len(batches) // 2) % len(batches)
        contender.seconds(batches[number], number)
    total = 0.0
    for call in range(calls):
        number = (first + call) % len(batches)
        total += contender.seconds(batches[number], number)
    time.sleep(contender.settle_s)
    return total / calls


def run_rounds(
    contenders: Sequence[Contender],
    batches: Sequence[Batch],
    budget_s: float,
    *,
    least: int = 3,
    most: int = 60,
    most_s: float = float("inf"),
) -> list[Timing]:
    """Rounds until the budget is spent, at least `least` unless that takes five times as long, or `most_s`. The order
    turns around every round, so that no contender is always first."""
    timings = [Timing() for _ in contenders]
    expected = [contender.seconds(batches[0], 0) for contender in contenders]
    # The number of calls a turn must not differ between contenders: the fastest decides.
    calls_for = min(expected)
    start = time.perf_counter()
    for number in range(most):
        order = range(len(contenders)) if number % 2 == 0 else reversed(range(len(contenders)))
        for index in order:
            timings[index].seconds.append(take_turn(contenders[index], batches, number, calls_for))
        spent_s = time.perf_counter() - start
        if spent_s > min(most_s, budget_s if number + 1 >= least else 5 * budget_s):
            break
    return timings
