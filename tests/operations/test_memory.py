"""The memory that is measured while a run lives: of real processes, beside the plan's estimate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import ended_with_the_test

from kt_launch.machine.memory import Held, read_held
from kt_launch.watching.peak_memory import FILE, PeakMemory, compare
from kt_model.plan import LaunchPlan, Resolved

MIB = 1 << 20
HELD = 96 * MIB


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    """A process that holds HELD bytes once it has said so."""
    program = f"held = bytearray(b'x') * {HELD}; print('held', flush=True); input()"
    started = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with ended_with_the_test(started) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def plan_of(needs: dict[str, dict[str, int]]) -> LaunchPlan:
    values = {"server.device": Resolved("cpu", "default"), "fit": Resolved(needs, "derived")}
    return LaunchPlan({}, values, (), {}, ())


def test_the_peak_outlives_the_process_and_the_error_is_told(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    with PeakMemory(plan_of({"host memory": {"one": 100 * MIB, "two": 100 * MIB}}), tmp_path) as memory:
        memory.watch([os.getpid(), holder.pid])
        memory.sample()
        memory.watch([])
        memory.sample()
    row = json.loads((tmp_path / FILE).read_text())["host memory"]
    assert row["measured_bytes"] >= HELD
    assert row["estimated_bytes"] == 200 * MIB
    assert row["error_percent"] == round(100 * (200 * MIB - row["measured_bytes"]) / row["measured_bytes"], 1)
    assert memory.line().startswith("host memory ")
    assert f"0.20 GiB estimated ({round(row['error_percent']):+} %)" in memory.line()


def test_a_process_that_is_gone_holds_nothing(holder: subprocess.Popen[str]) -> None:
    assert HELD <= read_held([holder.pid]).kept_bytes < 3 * HELD
    holder.kill()
    holder.wait()
    assert read_held([holder.pid]) == Held()


def test_pages_of_mapped_files_are_not_counted(tmp_path: Path) -> None:
    status = "Name:\tx\nVmHWM:\t 900 kB\nRssAnon:\t 100 kB\nRssFile:\t 700 kB\nRssShmem:\t 20 kB\n"
    (tmp_path / "proc/7").mkdir(parents=True)
    (tmp_path / "proc/7/status").write_text(status)
    assert read_held([7, 8], tmp_path) == Held(120 * 1024, 820 * 1024, 1)


def test_a_plan_without_an_estimate_still_has_its_peak() -> None:
    assert compare({}, {"host memory": 5}) == {
        "host memory": {"measured_bytes": 5, "estimated_bytes": 0, "error_percent": None}
    }


def test_nothing_seen_leaves_no_file(tmp_path: Path) -> None:
    with PeakMemory(plan_of({}), tmp_path) as memory:
        pass
    assert memory.line() == ""
    assert not (tmp_path / FILE).exists()


CARDS = "0, GPU-a, NVIDIA H200, 143771, {}\n1, GPU-b, NVIDIA H200, 143771, 143000\n"


@pytest.fixture
def nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What nvidia-smi answers to each query."""
    answers = {"--query-gpu": CARDS.format(143000), "--query-compute-apps": ""}
    monkeypatch.setattr("kt_launch.machine.host._ask_driver", lambda query: answers[query.partition("=")[0]])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return answers


def on_gpu(needs: int) -> LaunchPlan:
    values = {"server.device": Resolved("cuda", "probed"), "fit": Resolved({"GPU 0": {"one": needs}}, "derived")}
    return LaunchPlan({}, values, (), {}, ())


def sampled(folder: Path, nvidia_smi: dict[str, str], apps: str, needs: int = 1000 * MIB) -> PeakMemory:
    """A run of this process, in which a card has 40000 MiB less than before."""
    with PeakMemory(on_gpu(needs), folder) as memory:
        memory.watch([os.getpid()])
        nvidia_smi |= {"--query-gpu": CARDS.format(103000), "--query-compute-apps": apps}
        memory.sample()
        memory._gpus_seen_at = 0.0
        nvidia_smi["--query-compute-apps"] = ""
        memory.sample()
    return memory


def test_memory_of_a_card_is_that_of_our_own_processes(nvidia_smi: dict[str, str], tmp_path: Path) -> None:
    """Others may share the card, before the start and after."""
    own = os.getpid()
    memory = sampled(tmp_path, nvidia_smi, f"GPU-a, {own}, 900\nGPU-a, 1, 39000\nGPU-c, {own}, 7\nGPU-a, {own}, 100\n")
    assert memory.line() == "GPU 0 0.98 GiB at its peak, 0.98 GiB estimated (+0 %)"
    row = json.loads((tmp_path / FILE).read_text())["GPU 0"]
    assert row == {"measured_bytes": 1000 * MIB, "estimated_bytes": 1000 * MIB, "error_percent": 0.0}


def test_an_estimate_that_is_a_little_too_small_is_no_negative_zero(nvidia_smi: dict[str, str], tmp_path: Path) -> None:
    memory = sampled(tmp_path, nvidia_smi, f"GPU-a, {os.getpid()}, 1002\n")
    assert memory.line().endswith("0.98 GiB estimated (+0 %)")


@pytest.mark.parametrize("apps", ["", "GPU-a, 1, 40000\n", "GPU-a, {own}, [N/A]\n", "GPU-a, [N/A], 40000\n"])
def test_a_driver_that_names_none_of_our_processes_leaves_the_whole_card(
    apps: str, nvidia_smi: dict[str, str], tmp_path: Path
) -> None:
    memory = sampled(tmp_path, nvidia_smi, apps.format(own=os.getpid()), 20000 * MIB)
    assert memory.line() == "GPU 0 39.1 GiB at its peak (all processes on it), 19.5 GiB estimated (-50 %)"
    row = json.loads((tmp_path / FILE).read_text())["GPU 0"]
    assert (row["measured_bytes"], row["of"]) == (40000 * MIB, "all processes on it")
