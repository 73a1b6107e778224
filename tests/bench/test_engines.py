"""Hydra's own engines through the shipped choices: Optuna's sweeper, Ray here, Slurm as a cluster of this machine.

The job is action=plan, for which no server starts; that engines carry any action's row is all that is asked here.
"""

from __future__ import annotations

import json
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from launching import finish
from slurm import cluster, missing_programs
from tiny_files import write_checkpoint

JOB = ("model=auto", "action=plan", "format=json", "server.device=cpu", "lora=none")


def needs(plugin: str) -> pytest.MarkDecorator:
    missing = find_spec("hydra_plugins") is None or find_spec(f"hydra_plugins.{plugin}") is None
    return pytest.mark.skipif(
        missing, reason=f"hydra_plugins.{plugin} is not installed: pip install 'kt-launch[sweep]'"
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


def sweep(tmp_path: Path, *overrides: str, env: dict[str, str] | None = None) -> tuple[int, list[dict[str, Any]], str]:
    """Run a sweep to its end: exit code, rows, and what was said."""
    code, out, errors = finish(
        "-m", *JOB, f"sweep.folder={tmp_path / 'sweep'}", *overrides, runs=tmp_path / "r", env=env
    )
    rows = [json.loads(file.read_text()) for file in (tmp_path / "sweep" / "rows").glob("*.json")]
    return code, sorted(rows, key=lambda row: int(row["number"])), out + errors


@needs("hydra_optuna_sweeper")
def test_optuna_finds_the_best_of_a_number_of_the_plan(tmp_path: Path, checkpoint: Path) -> None:
    aim = ("sweep=optuna", "hydra.sweeper.n_trials=6", "sweep.objective=server.max_total_tokens")
    space = "server.context_length=64,128,256,512"
    code, rows, said = sweep(tmp_path, f"model.path={checkpoint}", *aim, space)
    assert code == 0, said
    tokens = {int(row["resolved"]["server.max_total_tokens"]) for row in rows}
    assert len(rows) >= 2 and {row["state"] for row in rows} == {"ok"}
    best = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    assert best["best_value"] == max(tokens)
    assert f"best: server.context_length={best['best_params']['server.context_length']}" in said


@needs("hydra_optuna_sweeper")
def test_optuna_goes_on_after_a_trial_that_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    aim = ("sweep=optuna", "hydra.sweeper.n_trials=6", "sweep.objective=kt.cpuinfer")
    code, rows, said = sweep(tmp_path, f"model.path={checkpoint}", *aim, "kt.cpuinfer=1,100000")
    assert code == 2, said
    assert {row["state"] for row in rows} == {"ok", "failed"}
    assert "best: kt.cpuinfer=1 (1.0)" in said


@needs("hydra_optuna_sweeper")
def test_a_search_whose_first_job_leaves_no_number_ends_there(tmp_path: Path, checkpoint: Path) -> None:
    aim = ("sweep=optuna", "hydra.sweeper.n_trials=6", "sweep.objective=kt.cpuinfr")
    code, rows, said = sweep(tmp_path, f"model.path={checkpoint}", *aim, "server.context_length=64,128")
    assert (code, len({row["began"] for row in rows if row["state"] == "ok"})) == (2, 1), said
    wrong = "error: sweep.objective: kt-launch plan leaves no number kt.cpuinfr, and a search needs one a job. "
    assert wrong + "Type kt-launch bench, or set sweep.objective=kt.cpuinfer." in said and "Traceback" not in said
    assert "\x1b[" not in said


@needs("hydra_ray_launcher")
def test_ray_runs_the_jobs_here(tmp_path: Path, checkpoint: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as logs:  # sockets lie there, too
        words = ("sweep=ray", f"+hydra.launcher.ray.init._temp_dir={logs}", "server.context_length=64,128")
        code, rows, said = sweep(tmp_path, f"model.path={checkpoint}", *words)
        workers = {int(log.stem.rpartition("-")[2]) for log in Path(logs).glob("session_*/logs/worker-*.out")}
    assert code == 0, said
    assert [row["resolved"]["server.context_length"] for row in rows] == [64, 128]
    assert {row["pid"] for row in rows} <= workers, "each in a worker of Ray's, which has a log under its number"


@needs("hydra_submitit_launcher")
def test_slurm_runs_the_jobs_on_a_cluster_of_this_machine(tmp_path: Path, checkpoint: Path) -> None:
    if missing := missing_programs():
        pytest.skip(f"{', '.join(missing)} not installed; on Debian: apt-get install slurm-wlm")
    with cluster(tmp_path / "slurm") as env:
        code, rows, said = sweep(
            tmp_path, f"model.path={checkpoint}", "sweep=slurm", "server.context_length=64,128", env=env
        )
    assert code == 0, said
    assert [row["resolved"]["server.context_length"] for row in rows] == [64, 128]
    assert all(row["slurm_job"] for row in rows)
    assert os.environ.get("SLURM_JOB_ID") is None
