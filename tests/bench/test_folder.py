"""A sweep's record on the disk: which rows are kept, which sweep goes on, what an optimizing sweeper gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench_rows import some_rows

from kt_launch.sweeps.folder import Row, SweepFolder, asked_of, choose_folder, row_key
from kt_launch.sweeps.summary import objective_of, summarize
from kt_model.errors import LaunchError

COMMAND = ["kt.cpuinfer=1,2", "action=bench"]


def row(**more: Any) -> Row:
    return Row({"number": 0, "overrides": ["kt.cpuinfer=1"], "state": "ok", "exit_code": 0, **more})


def begun(root: Path, name: str, *rows: Row, done: bool = False, command: list[str] = COMMAND) -> SweepFolder:
    folder = SweepFolder(root / name)
    folder.begin(command)
    for each in rows:
        folder.write_row(each)
    if done:
        folder.done()
    return folder


def test_a_row_is_keyed_by_what_its_job_was_asked() -> None:
    same = ["a=1", "b=2"]
    assert row_key(same) == row_key(["b=2", "a=1"]) == row_key([*same, "sweep.fail_fast=true", "hydra.verbose=true"])
    assert row_key(same) != row_key(["a=1", "b=3"])
    assert asked_of(["sweep=optuna", "kt.cpuinfer=1", "+hydra.launcher.x=1"]) == ["kt.cpuinfer=1"]


def test_rows_come_back_as_they_were_and_in_order(tmp_path: Path) -> None:
    folder = begun(tmp_path, "one")
    rows = some_rows()
    for each in reversed(rows):
        folder.write_row(each)
    assert folder.rows() == rows
    assert folder.row(rows[1]["overrides"]) == rows[1]
    assert folder.row(["something=else"]) is None


def test_the_same_job_twice_has_one_row_or_two(tmp_path: Path) -> None:
    folder = begun(tmp_path, "one", row(), row(number=2))
    assert [each["number"] for each in folder.rows()] == [2]
    folder.write_row(row(number=5), replace=False)
    assert [each["number"] for each in folder.rows()] == [2, 5]


@pytest.mark.parametrize("state", ["interrupted", "skipped"])
def test_jobs_that_did_not_come_to_an_end_leave_no_row(tmp_path: Path, state: str) -> None:
    assert begun(tmp_path, "one", row(state=state)).rows() == []


def test_a_half_written_row_is_no_row(tmp_path: Path) -> None:
    folder = begun(tmp_path, "one", row())
    (file,) = (folder.path / "rows").glob("*.json")
    file.write_text(file.read_text()[:20])
    assert folder.rows() == [] and folder.row(["kt.cpuinfer=1"]) is None


@pytest.mark.parametrize(
    ("done", "resume", "retry", "state", "goes_on"),
    [
        (False, True, False, "ok", True),
        (False, False, False, "ok", False),
        (True, True, False, "ok", False),
        (True, True, False, "crashed", False),
        (True, True, True, "crashed", True),
        (True, True, True, "ok", False),
    ],
)
def test_which_sweep_goes_on(tmp_path: Path, done: bool, resume: bool, retry: bool, state: str, goes_on: bool) -> None:
    earlier = begun(tmp_path, "20260101-000000", row(state=state), done=done)
    folder = choose_folder(tmp_path, [*COMMAND, f"sweep.retry={retry}"], resume, retry)
    assert (folder.path == earlier.path) == goes_on
    assert goes_on or not folder.path.exists()


def test_only_the_newest_sweep_of_the_same_command_goes_on(tmp_path: Path) -> None:
    begun(tmp_path, "20260101-000000")
    begun(tmp_path, "20260102-000000", done=True)
    begun(tmp_path, "20260103-000000", command=["kt.cpuinfer=3,4", "action=bench"])
    assert not choose_folder(tmp_path, COMMAND, True, False).path.exists()


def test_a_sweep_that_runs_is_left_alone(tmp_path: Path) -> None:
    running = begun(tmp_path, "20260101-000000")
    with running.held():
        assert choose_folder(tmp_path, COMMAND, True, False).path != running.path
        with pytest.raises(LaunchError, match=r"sweep\.folder: another kt-launch is running the sweep"), running.held():
            pass
    assert choose_folder(tmp_path, COMMAND, True, False).path == running.path


def test_a_stop_is_forgotten_by_the_next_try(tmp_path: Path) -> None:
    folder = begun(tmp_path, "one")
    folder.stop()
    assert folder.stopped
    folder.begin(COMMAND)
    assert not folder.stopped


def test_a_row_as_a_number_is_its_objective() -> None:
    assert float(row(objective=2.5)) == 2.5
    with pytest.raises(ValueError, match=r"job 0 has no kl: exit 3"):
        float(row(objective=None, objective_name="kl", error="exit 3"))


def test_objectives_come_from_the_summary_or_the_plan() -> None:
    record = some_rows()[1]
    assert objective_of(record, "kl") == pytest.approx(0.0009 * 1.3)
    assert objective_of({"resolved": {"kt.cpuinfer": 2}}, "kt.cpuinfer") == 2
    assert objective_of(record, "no such name") is None


def test_summary_takes_the_single_user_the_best_rate_and_the_worst_quality() -> None:
    summary = summarize(some_rows()[2])
    assert summary["ttft_ms"] == pytest.approx(4000 / 131)
    assert summary["output_tokens_per_s"] == pytest.approx(131 * 8**0.7)
    assert summary["top1_agreement"] == pytest.approx(1 - 0.021 * 1.3 * 4)
    assert all(value is None for value in summarize({"loads": []}).values())
