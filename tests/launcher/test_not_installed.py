"""Without torch and SGLang a launch is planned, and a start says with which command they are installed."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from kt_launch.doctor import environment, kernels
from kt_launch.machine.host import Gpu, read_host
from kt_launch.planning import device
from kt_model import installed
from kt_model.errors import Problems

Launch = Callable[..., Any]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a plain pip install."""
    monkeypatch.setattr(
        installed, "find_spec", lambda name: None if name in ("torch", "sglang") else ModuleSpec(name, None)
    )


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("experts", [(), ("kt.method=int8", "kt.prepare=true")])
@pytest.mark.parametrize("action", ["serve", "bench", "chat"])
def test_a_start_says_what_to_install_and_leaves_nothing(
    action: str, experts: tuple[str, ...], launch: Launch, checkpoint: Path, tmp_path: Path
) -> None:
    made = launch(action, f"model={checkpoint}", "server=cpu", *experts)
    assert (made.code, made.out, (tmp_path / "runs").exists()) == (2, "", False)
    (line,) = made.err.splitlines()
    said = re.fullmatch(
        r"error: server: torch and sglang are not installed in (\S+)\. On this machine, .*, run: (.*)", line
    )
    assert said is not None, line
    first, second = said[2].split(" && ")
    python, *words = shlex.split(first)
    assert (said[1], python) == (sys.prefix, sys.executable)
    assert words == ["-m", "pip", "install", "kt-launch[cpu]"]
    assert re.fullmatch(r"\S+ -m pip install --no-deps sglang==0\.5\.\d+", second)
    assert launch("plan", f"model={checkpoint}", "server=cpu").code == 0


@pytest.mark.usefixtures("bare")
def test_quantizing_says_that_it_needs_torch(launch: Launch, checkpoint: Path, tmp_path: Path) -> None:
    made = launch("quantize", f"model={checkpoint}", "kt.method=int8", f"kt.weight_path={tmp_path / 'made'}")
    assert (made.code, made.out, (tmp_path / "made").exists()) == (2, "", False)
    assert (
        made.err.startswith("error: quantize: torch is not installed in ")
        and "pip install 'kt-launch[cpu]'" in made.err
    )


@pytest.mark.usefixtures("bare")
def test_the_doctor_says_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = {"torch": None, "sglang": None}
    monkeypatch.setattr(environment, "version_of", lambda name: gone.get(name, installed.version_of(name)))
    checks = (environment.check_torch, environment.check_sglang, environment.check_seams, kernels.check_forward)
    first, *others = (check() for check in checks)
    assert first.detail == "torch is not installed" and first.fix.startswith(f"Run {sys.executable} -m pip install ")
    assert {found.fix for found in others} == {"The command above."}
    assert {found.status for found in (first, *others)} == {"fail"}


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("there", "begins"), [("uv", "uv pip install --python PYTHON 'kt"), ("", "PYTHON -m ensurepip && PYTHON -m pip ")]
)
def test_an_environment_without_pip(there: str, begins: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As uv makes them."""
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    monkeypatch.setattr(installed, "which", lambda name: name if name == there else None)
    assert installed.install_command(gpu=False).startswith(begins.replace("PYTHON", sys.executable))


@pytest.mark.usefixtures("bare")
def test_the_way_with_a_gpu() -> None:
    card = Gpu(0, "NVIDIA H100", 80 << 30, 79 << 30)
    problems = Problems()
    device.check_installed(replace(read_host(), gpus=(card,)), problems)
    (problem,) = problems.errors
    assert (
        problem.fix == f"On this machine, which has {card.name}, run: {sys.executable} -m pip install 'kt-launch[gpu]'"
    )
