"""Whether a server computes a model: compares its logprobs with those of the same model in float32. Pure.

The bounds are derived from the model itself. The float32 run is repeated with the result of every module and of every
matrix product rounded to bfloat16 (float32_run.py); the change in logprobs is the error to expect from a server in
bfloat16. A correct server differs from that run in two ways, and both are bounded:

- It also rounds in other places, each time by at most eps/2 (norms, rotations, the cache, B times an adapter's scale).
  Independent errors add in quadrature: 9 times as many places give FACTOR = 3 times the error. transformers itself in
  bfloat16 has 1.2 to 1.5 times the error of the rounded run, this server 1.0 to 1.4 times.

- When two experts nearly tie in a router, rounding decides, and logprobs jump further than rounding alone would move
  them. This happens at a share of positions that grows with the rounding error, so it is allowed TAIL times as often.

So for each share s in SHARES, the error exceeded at a share s of the positions must be below FACTOR times the error
that the rounded run exceeds at s / TAIL of its positions. A fault that affects every position (attention, norms,
router, head, rotation) shows at one half; one that affects some tokens (one expert in one layer) at a quarter or a
tenth. On models of three layers, such faults give 5 to 300 times the error of the rounded run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kt_launch.proving.logprobs import Answer, Floats, Integers

FACTOR = 3.0
TAIL = 2.0
SHARES = (0.5, 0.25, 0.1)
SMALLEST = 1e-3
"""Nats. A smaller difference of logprobs never matters, however little a model rounds."""


@dataclass(frozen=True)
class Reference:
    """The float32 run at N positions: its M most probable tokens and their logprobs; the error (N,) of the rounded
    run."""

    ids_NM: Integers
    logprobs_NM: Floats
    rounded_N: Floats
    how: str
    """What applied the adapter, such as PEFT."""

    def at(self, positions: Sequence[int]) -> Reference:
        """The given positions only."""
        places = np.array(positions)
        return Reference(self.ids_NM[places], self.logprobs_NM[places], self.rounded_N[places], self.how)


@dataclass(frozen=True)
class Agreement:
    """A comparison over all positions. Errors are in nats: for one position, the root mean square over the server's
    most probable tokens; for all positions, the error exceeded at a given share of them."""

    positions: int
    errors: dict[str, float]
    bounds: dict[str, float]
    rounding: float
    """Median error of the rounded run."""
    how: str
    worst: Worst

    @property
    def holds(self) -> bool:
        return all(self.errors[share] <= self.bounds[share] for share in self.errors)

    @property
    def median_bound(self) -> float:
        return self.bounds[_name(SHARES[0])]

    @property
    def median(self) -> float:
        return self.errors[_name(SHARES[0])]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        facts = {"positions": self.positions, "error": self.errors, "bound": self.bounds}
        return {**facts, "rounding": self.rounding, "how": self.how}


@dataclass(frozen=True)
class Worst:
    """The position with the largest error, the token, and its two logprobs."""

    position: int
    token: int
    found: float
    expected: float


def compare(answer: Answer, reference: Reference) -> Agreement:
    """Compares position by position; a token that the reference does not list counts as its least probable one."""
    expected_NK = np.stack(
        [_look_up(*row) for row in zip(answer.ids_NK, reference.ids_NM, reference.logprobs_NM, strict=True)]
    )
    with np.errstate(invalid="ignore"):
        off_NK = np.nan_to_num(np.abs(answer.logprobs_NK - expected_NK), nan=np.inf)
    error_N = np.sqrt(np.square(off_NK.astype(np.float64)).mean(axis=1))
    errors = {_name(share): exceeded(error_N, share) for share in SHARES}
    bounds = {_name(share): bound(reference.rounded_N, share) for share in SHARES}
    worst = int(error_N.argmax())
    column = int(off_NK[worst].argmax())
    return Agreement(
        positions=len(error_N),
        errors=errors,
        bounds=bounds,
        rounding=exceeded(reference.rounded_N, SHARES[0]),
        how=reference.how,
        worst=Worst(
            position=worst,
            token=int(answer.ids_NK[worst, column]),
            found=float(answer.logprobs_NK[worst, column]),
            expected=float(expected_NK[worst, column]),
        ),
    )


def bound(rounded_N: Floats, share: float) -> float:
    """Upper bound of the error exceeded at this share of the positions."""
    return max(FACTOR * exceeded(rounded_N, share / TAIL), SMALLEST)


def exceeded(error_N: Floats | np.ndarray[Any, np.dtype[np.float64]], share: float) -> float:
    """The error exceeded at this share of the positions."""
    return float(np.quantile(error_N, 1 - share, method="higher"))


def _look_up(wanted_K: Integers, ids_M: Integers, logprobs_M: Floats) -> Floats:
    places = {int(token): float(logprob) for token, logprob in zip(ids_M, logprobs_M, strict=True)}
    return np.array([places.get(int(token), float(logprobs_M[-1])) for token in wanted_K], np.float32)


def _name(share: float) -> str:
    return f"{share:.0%}"
