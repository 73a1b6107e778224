"""Whether a server computes a model: its logprobs against those of the same model in float32. Pure.

What must hold is derived from the model itself. The float32 run is repeated with the result of every module and of
every matrix product rounded as bfloat16 rounds it (float32_run.py); how far that moves the logprobs is what a server in
bfloat16 may be off. Two things make the server differ from it in a right model, and both are bounded:

- It rounds at other places too, each time by at most eps/2 (norms, rotations, the cache, B times scale of an adapter).
  Independent errors add by their squares: 9 times as many places make FACTOR = 3 times the error. transformers itself
  in bfloat16 is 1.2 to 1.5 times off the rounded run, this server 1.0 to 1.4 times.
- Where two experts nearly tie in a router, rounding decides, and the logprobs jump further than any rounding moves
  them. This happens at a share of all positions that grows with the rounding, so at most so much more often: TAIL
  times.

So: the error that a share s of the positions exceeds must be below FACTOR times the error that s / TAIL of the
positions of the rounded run exceed, for each s of SHARES. What is wrong in every position (attention, norms, router,
head, rotation) shows at one half, what is wrong for some tokens (one expert in one layer) at a quarter or a tenth: such
faults make 5 to 300 times the error of the rounded run on models of three layers.
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
"""Nats. Below this no difference of logprobs matters, however little a model rounds."""


@dataclass(frozen=True)
class Reference:
    """The float32 run at N positions: its M most probable tokens and their logprobs; the error (N,) of the rounded
    run."""

    ids_NM: Integers
    logprobs_NM: Floats
    rounded_N: Floats
    how: str
    """What applied the adapter."""

    def at(self, positions: Sequence[int]) -> Reference:
        """Of some positions only."""
        places = np.array(positions)
        return Reference(self.ids_NM[places], self.logprobs_NM[places], self.rounded_N[places], self.how)


@dataclass(frozen=True)
class Agreement:
    """A comparison over all positions. Errors are in nats: of each position the root of the mean square over the
    server's most probable tokens, of all positions the one that a share exceeds."""

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
    """Where the server is furthest off: the position among all, the token, and its two logprobs."""

    position: int
    token: int
    found: float
    expected: float


def compare(answer: Answer, reference: Reference) -> Agreement:
    """Held against each other position by position; a token that the reference does not list counts as its last one."""
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
    """What the error that a share of the positions exceeds must be below."""
    return max(FACTOR * exceeded(rounded_N, share / TAIL), SMALLEST)


def exceeded(error_N: Floats | np.ndarray[Any, np.dtype[np.float64]], share: float) -> float:
    """The error that this share of the positions exceeds."""
    return float(np.quantile(error_N, 1 - share, method="higher"))


def _look_up(wanted_K: Integers, ids_M: Integers, logprobs_M: Floats) -> Floats:
    places = {int(token): float(logprob) for token, logprob in zip(ids_M, logprobs_M, strict=True)}
    return np.array([places.get(int(token), float(logprobs_M[-1])) for token in wanted_K], np.float32)


def _name(share: float) -> str:
    return f"{share:.0%}"
