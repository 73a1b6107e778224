"""A sweep of benches on real servers: measured, killed half way, continued; one row refused and one server that dies.

Two servers come up in all: one for the first job, one for the second after the kill.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from launching import finish, start, wait_gone, wait_until
from tiny_checkpoints import write_checkpoint, write_unwritten

pytestmark = pytest.mark.server
LOADS = ("bench.concurrency=[1,2]", "bench.requests=4", "bench.output_tokens=8", "bench.warmup=1")
UNPROVEN = ("proof.whole_model=off", "proof.text=warn")


@dataclass
class Swept:
    """A sweep that was killed while its second job ran, and then continued by the same command."""

    folder: Path
    left: list[psutil.Process]
    first_row: str
    code: int
    said: str

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(file.read_text()) for file in row_files(self.folder)]


def row_files(root: Path) -> list[Path]:
    return sorted(root.glob("sweeps/*/rows/*.json"))


def everything_below(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swept]:
    runs = tmp_path_factory.mktemp("swept")
    model = write_checkpoint("deepseek_v2", runs / "model")
    adapter = Path(__file__).parent.parent / "fixtures" / "adapters" / "deepseek_v2" / "experts_r4"
    places = ("model=auto", f"model.path={model}", f"lora.adapters.r4.path={adapter}", "action=bench")
    (runs / "presets" / "kt").mkdir(parents=True)
    (runs / "presets" / "kt" / "too_much.yaml").write_text("cpuinfer: 100000\n")
    choices = ("-m", "--config-dir", str(runs / "presets"), "kt=bf16,int8,too_much", "kt.prepare=true")
    command = (*choices, *places, *LOADS, *UNPROVEN)
    env = {"KT_LAUNCH_CACHE": str(runs / "cache")}
    process = start(*command, runs=runs, env=env)
    wait_until(lambda: row_files(runs) or process.poll() is not None, timeout_s=400)
    assert process.poll() is None, (runs / "stderr.txt").read_text()
    (first,) = row_files(runs)
    first_row = first.read_text()
    wait_until(lambda: len(everything_below(process)) >= 3)
    left = everything_below(process)
    process.kill()
    process.wait()
    gone_wrong = wait_gone(left)
    code, out, errors = finish(*command, runs=runs, timeout=500, env=env)
    yield Swept(runs, gone_wrong, first_row, code, out + errors)


def test_a_kill_of_the_sweep_leaves_no_process_of_a_job(swept: Swept) -> None:
    assert swept.left == []


def test_the_same_command_goes_on_without_repeating_a_row(swept: Swept) -> None:
    assert len(list(swept.folder.glob("sweeps/*/sweep.json"))) == 1
    assert "continuing in" in swept.said and "job 0: its row exists already (ok)" in swept.said
    assert row_files(swept.folder)[0].read_text() == swept.first_row


def test_a_job_that_is_refused_is_a_row_and_the_exit_code(swept: Swept) -> None:
    assert swept.code == 2, swept.said
    assert [row["state"] for row in swept.rows()] == ["ok", "ok", "failed"]
    assert "kt.cpuinfer: 100000 threads" in swept.rows()[2]["error"]


def test_speed_is_measured_for_base_and_adapter_at_each_concurrency(swept: Swept) -> None:
    for row in swept.rows()[:2]:
        asked = [(load["target"], load["concurrency"]) for load in row["loads"]]
        assert asked == [("base", 1), ("base", 2), ("r4", 1), ("r4", 2)]
        for load in row["loads"]:
            assert load["completed"] == load["requests"] == 4 and load["error"] is None
            assert load["output_tokens"] == 4 * 8 and load["input_tokens"] >= 4 * 100
            assert 0 < load["ttft_ms"]["median"] <= load["ttft_ms"]["p99"] < load["duration_s"] * 1000
            assert load["output_tokens_per_s"] == pytest.approx(32 / load["duration_s"], rel=0.02)


def test_bf16_is_measured_against_itself_and_int8_against_bf16(swept: Swept) -> None:
    rows = swept.rows()
    for row, far in zip(rows[:2], (0.0, 0.05), strict=True):
        assert [found["target"] for found in row["quality"]] == ["base", "r4"]
        for found in row["quality"]:
            assert found["tokens"] > 500
            assert found["kl"]["mean"] <= far and found["top1_agreement"] >= 1 - 4 * far
    assert rows[0]["quality"][0]["reference"]["by"].startswith("a first pass")
    assert rows[1]["quality"][0]["reference"]["by"] == "an earlier BF16 server"
    assert rows[0]["quality"][0]["kl"] == {"mean": 0.0, "max": 0.0}
    assert 0 < rows[1]["quality"][0]["kl"]["mean"] < rows[1]["quality"][0]["kl"]["max"]
    assert rows[0]["quality"][0]["reference"]["sha256"] == rows[1]["quality"][0]["reference"]["sha256"]
    assert rows[0]["quality"][0]["reference"]["file"] != rows[0]["quality"][1]["reference"]["file"]


def test_memory_and_start_are_measured(swept: Swept) -> None:
    for row, method in zip(swept.rows()[:2], ("bf16", "int8"), strict=True):
        assert row["memory"]["processes"] >= 3
        assert 2**29 < row["memory"]["pss_bytes"] <= row["memory"]["peak_rss_bytes"] < psutil.virtual_memory().total
        assert 1 < row["start"]["phases"]["ready"] <= row["start"]["ready_s"] < row["seconds"]
        proof = json.loads((Path(row["run_folder"]) / "proof.json").read_text())
        assert proof["method"] == method and proof["difference"]["r4"] > 0


def test_the_report_is_shown_and_lies_in_the_sweeps_folder(swept: Swept) -> None:
    (folder,) = swept.folder.glob("sweeps/*")
    assert {f"results.{form}" for form in ("md", "csv", "json", "html")} <= {file.name for file in folder.iterdir()}
    assert f"report: {folder / 'results.html'}" in swept.said
    assert (folder / "results.html").read_text().count('class="plot"') == 4
    assert "| kt=int8 | r4 |" in (folder / "results.md").read_text()


def test_fail_fast_begins_no_further_job(tmp_path: Path) -> None:
    model = write_checkpoint("deepseek_v2", tmp_path / "model")
    command = ("-m", "kt.cpuinfer=100000,1,2", "model=auto", f"model.path={model}", "action=bench")
    code, _, errors = finish(*command, "sweep.fail_fast=true", runs=tmp_path)
    assert code == 2, errors
    assert [json.loads(file.read_text())["state"] for file in row_files(tmp_path)] == ["failed"]
    assert "job 1" not in errors


def test_a_server_that_does_not_come_up_is_a_row_that_says_why(tmp_path: Path) -> None:
    """A scheduler finds weights in its model that the checkpoint lacks, which no name tells."""
    model = write_unwritten(tmp_path / "model")
    code, out, errors = finish("model=auto", f"model.path={model}", *UNPROVEN, "action=bench", runs=tmp_path)
    assert code == 3, errors
    assert f"error: model.path: {model} provides no values for 3 tensors of the model: model.layers.0.self_" in errors
    assert "its log is" in errors and "server.log" in errors and "Traceback" not in errors
    assert not list(tmp_path.rglob("packed")), "nothing of it is kept in the packed cache"
    assert "failed: " in out
    (page,) = tmp_path.glob("*/results.html")
    assert "Not measured" in page.read_text()


def test_ctrl_c_ends_a_bench_and_its_server(tmp_path: Path) -> None:
    model = write_checkpoint("deepseek_v2", tmp_path / "model")
    process = start("model=auto", f"model.path={model}", "action=bench", *UNPROVEN, runs=tmp_path)
    wait_until(lambda: len(everything_below(process)) >= 3)
    below = everything_below(process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 130
    assert wait_gone(below) == []
