"""What people see while a server comes up and once it is ready."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from launching import wait_until

from kt_launch.watching import progress
from kt_launch.watching.progress import Progress
from kt_launch.watching.ready_lines import ready_lines
from kt_model.contract import PROGRESS, progress_line
from kt_model.plan import LaunchPlan, Resolved

Operations = Any


def plan_of(operations: Operations, **changes: Any) -> LaunchPlan:
    plan = LaunchPlan.read(operations.recorded().folder / "plan.json")
    resolved = {**plan.resolved, **{key: Resolved(value, "") for key, value in changes.items()}}
    return replace(plan, resolved=resolved)


def test_ready_tells_ids_request_chat_stop_and_log_in_80_columns(operations: Operations) -> None:
    adapters = {f"lora.adapter-{number}.path": "/a" for number in range(12)}
    plan = plan_of(operations, **{"model.name": "Qwen3-30B-A3B-Instruct"}, **adapters)
    folder = operations.runs / "20261127-031911-Qwen3-30B-A3B-Instruct"
    lines = list(ready_lines(plan, folder, by_ctrl_c=True))
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [
        *("ready:", "ask:", "curl:", "chat:", "stop:", "log:")
    ]
    told = [line for line in lines if str(folder) not in line]
    assert all(len(line) <= 80 for line in told), told
    assert "".join(lines).count("Qwen3-30B-A3B-Instruct:adapter-11") == 2
    assert next(line for line in lines if line.startswith("stop:")).startswith("stop:  Ctrl-C, or kt-launch stop run=")


def test_a_run_is_named_as_the_command_finds_it(operations: Operations, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, folder = plan_of(operations), operations.latest().folder
    monkeypatch.setenv("KT_LAUNCH_RUNS", str(operations.runs))
    assert f"chat:  kt-launch chat run={folder.name}" in list(ready_lines(plan, folder, False))
    monkeypatch.setenv("KT_LAUNCH_RUNS", "/elsewhere")
    assert f"stop:  kt-launch stop run={folder}" in list(ready_lines(plan, folder, False))


@pytest.mark.parametrize("reference", ["env:OWN_KEY", "file:/tmp/a key", None])
def test_the_request_can_be_pasted_and_never_holds_the_key(
    operations: Operations, reference: str | None, tmp_path: Path
) -> None:
    """A shell runs it, with `curl` as a program that shows its arguments."""
    plan = plan_of(operations, **({"server.api_key": reference} if reference else {}))
    lines = list(ready_lines(plan, operations.latest().folder, False))
    begin = next(number for number, line in enumerate(lines) if line.startswith("curl:"))
    end = next(number for number, line in enumerate(lines) if line.startswith("chat:"))
    command = "\n".join(line[7:] for line in lines[begin:end])
    shows = tmp_path / "curl"
    shows.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    shows.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OWN_KEY": "hush-hush"}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, check=True)
    words = json.loads(done.stdout)
    assert words[0] == f"http://127.0.0.1:{plan.value('server.port')}/v1/chat/completions"
    assert json.loads(words[-1]) == {"model": "tiny:west", "messages": [{"role": "user", "content": "Hello"}]}
    assert "hush-hush" not in command
    assert ("Authorization: Bearer hush-hush" in words) == (reference == "env:OWN_KEY")


def test_a_started_server_tells_it_also_detached(operations: Operations) -> None:
    run = operations.recorded()
    done = operations.call("action=replay", f"run={run.name}", "detach=true")
    assert done.returncode == 0, done.stderr
    started = operations.latest()
    assert f"stop:  kt-launch stop run={started.name}" in done.stdout.splitlines()
    assert f"log:   {started.folder / 'server.log'}" in done.stdout.splitlines()
    assert httpx.get(f"{done.stdout.split('ready: ')[1].split()[0]}/v1/models", trust_env=False, timeout=120).is_success
    assert operations.call("action=stop").returncode == 0


LOG = (
    (
        progress_line("import", 1812, 0, "modules", "sglang.srt.models"),
        "import SGLang: 1,812 modules, sglang.srt.models",
    ),
    ("[x] server_args={...}", "processes"),
    ("Memory baseline taken. mem usage=0.01 GB", "model code"),
    ("[x] Load weight begin. avail mem=17.58 GB", "weights"),
    (progress_line("weights", 812, 1664, "experts"), "weights: 812 of 1,664 experts"),
)


def test_progress_lines_are_read_as_they_are_written() -> None:
    found = PROGRESS.search(progress_line("import", 12, 0, "modules", "torch._C"))
    assert found and found.groupdict() == {
        "phase": "import",
        "done": "12",
        "total": None,
        "unit": "modules",
        "what": "torch._C",
    }


def test_without_a_terminal_a_long_phase_says_how_far_it_is(
    operations: Operations, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "HEARTBEAT_S", 0.2)
    run, said = operations.recorded(), ""

    def is_said(pattern: str) -> bool:
        nonlocal said
        said += capsys.readouterr().err
        return re.search(pattern, said, re.MULTILINE) is not None

    with Progress(LaunchPlan.read(run.folder / "plan.json"), run.folder) as shown:
        for line, expected in LOG:
            shown.log_line(line)
            wait_until(partial(is_said, rf"^ +[\d.]+ s  {re.escape(expected)}$"))
        shown.compiling(["g++"])
        wait_until(partial(is_said, re.escape("experts, compiling (g++)")))
    assert "\033" not in said


@contextlib.contextmanager
def read_to_its_end(screen: int, content: bytearray) -> Iterator[None]:
    """What is shown on a terminal, until nobody has it open any more."""

    def read() -> None:
        with contextlib.suppress(OSError):
            while piece := os.read(screen, 1 << 16):
                content.extend(piece)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield
    finally:
        reader.join()
        os.close(screen)


def without_codes(shown: str) -> str:
    return re.sub(r"\033\[[0-9;?]*[a-zA-Z]", "", shown)


@pytest.mark.parametrize("no_color", [False, True])
def test_on_a_terminal_a_bar_moves_within_its_width(
    operations: Operations, monkeypatch: pytest.MonkeyPatch, no_color: bool
) -> None:
    run = operations.recorded()
    plan = LaunchPlan.read(run.folder / "plan.json")
    screen, terminal = pty.openpty()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1") if no_color else monkeypatch.delenv("NO_COLOR", raising=False)
    content = bytearray()
    bar = re.compile(r"━.* s  weights: 812 of 1,664 experts")
    with read_to_its_end(screen, content):
        with os.fdopen(terminal, "w") as stderr:
            monkeypatch.setattr(sys, "stderr", stderr)
            with Progress(plan, run.folder) as shown:
                for line, _ in LOG:
                    shown.log_line(line)
                wait_until(lambda: bar.search(without_codes(content.decode(errors="replace"))))
        monkeypatch.undo()
    said = content.decode()
    assert (re.search(r"\033\[[0-9;]*3[0-9]", said) is None) == no_color, said
    lines = re.split(r"[\r\n]+", without_codes(said))
    assert max(map(len, lines)) <= 80
    assert said.count("\033[?25l") <= said.count("\033[?25h"), "the cursor is there again"
