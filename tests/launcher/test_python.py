"""`from kt_launch import plan`: the plan that the command makes, from values of Python; costs nothing until used."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tiny_files import write_adapter, write_checkpoint

from kt_launch import LaunchError, LaunchPlan, plan
from kt_launch.api import as_words
from kt_launch.cli import main


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint and an adapter, below a folder whose name means something to Hydra's grammar."""
    write_checkpoint(tmp_path / "a, b" / "tiny")
    write_adapter(tmp_path / "a, b" / "west")
    return tmp_path / "a, b" / "tiny", tmp_path / "a, b" / "west"


def own_plan(folders: tuple[Path, Path], **more: Any) -> LaunchPlan:
    model, west = folders
    lora = {"path": west, "name": "west"}
    return plan("model=auto", model={"path": model}, lora=lora, server={"device": "cpu", "port": 11123}, **more)


def test_the_plan_is_that_of_the_command(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    model, west = folders
    words = [f"model.path={model}", f"lora.path={west}", "lora.name=west", "server.device=cpu", "server.port=11123"]
    assert main(["action=plan", "format=json", "model=auto", *words, "server.extra_args=[--log-level,debug]"]) == 0
    by_command = json.loads(capsys.readouterr().out)
    found = json.loads(own_plan(folders, **{"server.extra_args": ["--log-level", "debug"]}).to_json())
    for fast_changing in ("fit.free",):
        found["resolved"].pop(fast_changing), by_command["resolved"].pop(fast_changing)
    assert found["resolved"].keys() == by_command["resolved"].keys()
    assert found["argv"] == by_command["argv"]
    assert found["config"]["server"] == by_command["config"]["server"]


def test_values_are_typed_as_a_person_would() -> None:
    given = {
        "model": "auto",
        "lora": ["west", {"name": "chef", "path": Path("/adapters/chef")}],
        "kt": {"cpuinfer": 48, "prepare": True, "weight_path": None},
        "server": {"extra_args": ["--log-level", "debug"]},
        "model.path": Path("/models/it's, here"),
    }
    assert as_words(given) == [
        "model=auto",
        "lora=[west,{name: chef, path: /adapters/chef}]",
        "kt.cpuinfer=48",
        "kt.prepare=true",
        "kt.weight_path=null",
        "server.extra_args=['--log-level','debug']",
        r"model.path='/models/it\'s, here'",
    ]


def test_it_plans_in_several_threads_at_once(folders: tuple[Path, Path]) -> None:
    threads_found: dict[int, int] = {}

    def work(count: int) -> None:
        threads_found[count] = own_plan(folders, kt={"cpuinfer": count}).value("kt.cpuinfer")

    workers = [threading.Thread(target=work, args=(count,)) for count in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert threads_found == {1: 1, 2: 2}


def test_a_program_that_uses_hydra_keeps_its_state(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()  # the command, called by other tests, has left its own
    (tmp_path / "mine.yaml").write_text("number: 7\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        own_plan(folders)
        assert compose("mine").number == 7


@pytest.mark.parametrize("word", ["action=serve", "detach=true", "-m", "kt.cpuinfer"])
def test_words_that_are_the_commands_are_refused(word: str) -> None:
    with pytest.raises(LaunchError, match=r"Python has Server and plan|key=value is expected"):
        plan(word)


def test_importing_the_package_costs_nothing() -> None:
    program = "import sys; before = set(sys.modules); import kt_launch; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {name.partition(".")[0] for name in done.stdout.split()} - sys.stdlib_module_names == {"kt_launch"}
    assert "kt_launch.api" not in done.stdout


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "kt_launch", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("kt-launch ")
