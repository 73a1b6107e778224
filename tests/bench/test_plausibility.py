"""Numbers that cannot be are measured again and, where they stay so, marked."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from bench_rows import some_rows

from kt_launch.bench.plausibility import TRIES, doubts, measure_again
from kt_launch.sweeps.tables import lines
from kt_model.errors import BenchFailed


def a_load(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(some_rows()[0]["loads"][0]), **changes}


def times(value: float) -> dict[str, float]:
    return dict.fromkeys(("mean", "median", "p90", "p99"), value)


def test_what_was_measured_can_be() -> None:
    assert [list(doubts(load)) for row in some_rows() for load in row.get("loads") or []] != []
    assert all(not list(doubts(load)) for row in some_rows() for load in row.get("loads") or [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tpot_ms", times(0.0)),
        ("tpot_ms", times(0.03)),
        ("tpot_ms", None),
        ("ttft_ms", times(float("nan"))),
        ("ttft_ms", times(1e9)),
        ("output_tokens_per_s", 0.0),
        ("output_tokens_per_s", float("inf")),
        ("duration_s", -1.0),
    ],
)
def test_what_cannot_be_is_doubted(name: str, value: Any) -> None:
    assert name in dict(doubts(a_load(**{name: value})))


def test_a_second_run_that_can_be_is_taken() -> None:
    runs, said = iter([a_load(tpot_ms=times(0.0)), a_load()]), list[str]()
    assert measure_again(lambda: next(runs), said.append) == a_load()
    assert said == ["implausible (tpot_ms: 0 ms a token is less than 0.1 ms); measuring again"]


def test_what_stays_impossible_is_marked_in_record_and_table() -> None:
    said: list[str] = []
    found = measure_again(lambda: a_load(tpot_ms=times(0.0)), said.append)
    assert len(said) == TRIES and said[-1].endswith("not measured")
    assert found["tpot_ms"] is None and list(found["not_measured"]) == ["tpot_ms"]
    rows = some_rows()[:1]
    rows[0]["loads"] = [found]
    assert lines(rows)[0].cells[3] == "-"


def test_a_load_without_any_rate_fails() -> None:
    with pytest.raises(BenchFailed, match="output_tokens_per_s is 0 after 3 tries"):
        measure_again(lambda: a_load(output_tokens_per_s=0.0), lambda _: None)
