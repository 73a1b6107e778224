"""Completion in real shells: what is offered after a few letters, and that completing starts no Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kt_launch.config.actions import ACTIONS

Launch = Callable[..., Any]

BASH = """
source "$1"
COMP_LINE="kt-launch $2" COMP_POINT=$((10 + ${#2}))
compopt() { :; }
_kt_launch
printf '%s\\n' "${COMPREPLY[@]}"
"""
FISH = 'source $argv[1]; complete -C"kt-launch $argv[2]"'
# zsh completes in an interactive shell only: one is driven through a pseudo terminal, and its last list is printed.
ZSH = """
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell "autoload -Uz compinit; compinit -u -D; source '$1'; PS1=; setopt no_list_beep"
zpty -w shell 'show() { print -r -- BE""GIN $BUFFER E""ND }; zle -N show; bindkey "^X" show'
zpty -w shell 'print RE""ADY'
zpty -r -m shell out '*READY*'
zpty -w -n shell "kt-launch $2"$'\\t'$'\\x18'
zpty -r -m shell out '*BEGIN*END*'
print -r -- $out
"""


@pytest.fixture
def script(launch: Launch, tmp_path: Path) -> Callable[[str], Path]:
    def write(shell: str) -> Path:
        made = launch("--completion", shell)
        assert made.code == 0
        (tmp_path / f"completion.{shell}").write_text(made.out)
        return tmp_path / f"completion.{shell}"

    return write


def shell_output(shell: str, code: str, *arguments: str) -> str:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    named = ["shell"] if shell != "fish" else []
    environment = {"PATH": "/nowhere", "HOME": "/nowhere", "TERM": "dumb"}
    environment["KT_LAUNCH_RUNS"] = os.environ.get("SHELL_RUNS", "/nowhere")
    if shell == "zsh":
        environment["PATH"] = "/usr/bin:/bin"
    command = [program, "-c", code, *named, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300).stdout


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("kt.cpu", ["kt.cpuinfer="]),
        ("model=de", ["deepseek_v2_lite", "demo"]),
        ("lora=n", ["none"]),
        ("kt.method=int", ["int8", "int4"]),
        ("--mul", ["--multirun"]),
        ("action=", sorted(ACTIONS)),
        ("key=kt.cpu", ["kt.cpuinfer"]),
    ],
)
def test_bash(typed: str, offered: list[str], script: Callable[[str], Path]) -> None:
    assert shell_output("bash", BASH, str(script("bash")), typed).split() == offered


@pytest.mark.parametrize("key", ["model.path", "model", "lora"])
def test_bash_completes_files_after_a_path(key: str, script: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    shown = shell_output("bash", BASH, str(script("bash")), f"{key}={tmp_path}/check")
    assert shown.split() == [f"{tmp_path}/checkpoint"]


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of presets and one of runs."""
    for name in ("own/lora/mine.yaml", "runs/20261127-tiny/plan.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("SHELL_RUNS", str(tmp_path / "runs"))
    return tmp_path / "own"


LOOKED_UP = [
    ("lora=mine", "lora=mine"),
    ("lora=[west_all,mi", "lora=[west_all,mine"),
    ("lora=[demo_", "lora=[demo_west"),
    ("run=2026", "run=20261127-tiny"),
    ("runs=[x,2026", "runs=[x,20261127-tiny"),
]


@pytest.mark.parametrize(("typed", "completed"), LOOKED_UP)
@pytest.mark.parametrize("shell", ["bash", "fish", "zsh"])
def test_runs_presets_of_ones_own_and_items_of_lists(
    shell: str, typed: str, completed: str, found: Path, script: Callable[[str], Path]
) -> None:
    line = f"--config-dir {found} {typed}"
    if shell == "bash":
        assert f"{typed.partition('=')[0]}={shell_output('bash', BASH, str(script('bash')), line).strip()}" == completed
    elif shell == "fish":
        assert shell_output("fish", FISH, str(script("fish")), line).split()[0] == completed
    else:
        quote = "'" if "[" in typed else ""  # as zsh needs it, which takes [ for a pattern
        shown = shell_output("zsh", ZSH, str(script("zsh")), f"--config-dir {found} {quote}{typed}")
        assert f"BEGIN kt-launch --config-dir {found} {quote}{completed}" in shown


@pytest.mark.parametrize("shell", ["bash", "fish", "zsh"])
def test_runs_after_an_action_about_them(shell: str, found: Path, script: Callable[[str], Path]) -> None:
    code = {"bash": BASH, "fish": FISH, "zsh": ZSH}[shell]
    shown = shell_output(shell, code, str(script(shell)), "stop 2026")
    assert "BEGIN kt-launch stop 20261127-tiny" in shown if shell == "zsh" else shown.split() == ["20261127-tiny"]
    assert "20261127-tiny" not in shell_output(shell, code, str(script(shell)), "plan 2026")


@pytest.mark.parametrize(
    ("typed", "offered"), [("kt.cpu", ["kt.cpuinfer="]), ("model=dee", ["model=deepseek_v2_lite"])]
)
def test_fish(typed: str, offered: list[str], script: Callable[[str], Path]) -> None:
    assert shell_output("fish", FISH, str(script("fish")), typed).split() == offered


def test_fish_completes_files_after_a_path_and_only_there(script: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    made, typed = str(script("fish")), str(tmp_path / "check")
    assert shell_output("fish", FISH, made, f"model.path={typed}").split() == [f"model.path={tmp_path}/checkpoint/"]
    assert shell_output("fish", FISH, made, typed).split() == []


@pytest.mark.parametrize(("typed", "completed"), [("kt.cpu", "kt.cpuinfer="), ("model=dee", "model=deepseek_v2_lite")])
def test_zsh(typed: str, completed: str, script: Callable[[str], Path]) -> None:
    shown = shell_output("zsh", ZSH, str(script("zsh")), typed)
    assert f"BEGIN kt-launch {completed}" in shown


def test_zsh_completes_files_after_a_model(script: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    shown = shell_output("zsh", ZSH, str(script("zsh")), f"model={tmp_path}/check")
    assert f"BEGIN kt-launch model={tmp_path}/checkpoint" in shown


@pytest.mark.parametrize("shell", ["bash", "fish", "zsh"])
def test_keys_after_explain_are_names_alone(shell: str, script: Callable[[str], Path]) -> None:
    code = {"bash": BASH, "fish": FISH, "zsh": ZSH}[shell]
    shown = shell_output(shell, code, str(script(shell)), "explain kt.cpu")
    assert re.search(r"BEGIN kt-launch explain kt\.cpuinfer\s", shown) if shell == "zsh" else shown == "kt.cpuinfer\n"
    shown = shell_output(shell, code, str(script(shell)), "explain kt.cpuinfer kt.meth")
    assert "kt.method=" in shown


def test_presets_of_ones_own_are_completed(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "own/model").mkdir(parents=True)
    (tmp_path / "own/model/mine.yaml").write_text("path: /x\n")
    assert "model=mine" in launch("--config-dir", str(tmp_path / "own"), "--completion", "bash").out


def test_an_unknown_shell(launch: Launch) -> None:
    made = launch("--completion", "csh")
    assert (made.code, made.err) == (2, "error: --completion: no script for csh. Did you mean zsh?\n")
