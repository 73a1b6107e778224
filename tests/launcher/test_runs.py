"""Run folders and their records: listed, compared, and identified by what they stood on."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from machines import Machine
from tiny_files import write_adapter

from kt_launch.actions import replay
from kt_launch.machine.host import read_host
from kt_launch.runs.lock import read_lock
from kt_launch.runs.runs import create_run_folder
from kt_launch.runs.state import RunStateWriter
from kt_model.plan import LaunchPlan

Launch = Callable[..., Any]


@pytest.fixture
def record(plan: Launch, tmp_path: Path) -> Callable[..., Path]:
    """Records a run as serve does, without the server."""
    host = read_host(Machine().write(tmp_path / "machine"))

    def call(*overrides: str) -> Path:
        made = LaunchPlan.from_json(plan(*overrides).out)
        folder = create_run_folder(None, made.value("model.name"))
        made.placed_in(folder).write(folder / "plan.json")
        (folder / "lock.json").write_text(json.dumps(read_lock(made, host, list(overrides))))
        return folder

    return call


def test_run_folders_of_one_second_have_names_of_their_own(tmp_path: Path) -> None:
    folders = {create_run_folder(str(tmp_path), "a model") for _ in range(5)}
    assert len(folders) == 5
    assert all(folder.stat().st_mode & 0o077 == 0 for folder in folders)


def test_runs_are_listed_with_their_state(record: Callable[..., Path], launch: Launch, adapter: Path) -> None:
    folder = record(f"lora.path={adapter}")
    shown = launch("action=runs").out
    assert folder.name in shown
    assert "not started" in shown
    assert "west" in shown


def test_no_runs_at_all(launch: Launch, tmp_path: Path) -> None:
    assert launch("action=runs").out == f"no runs in {tmp_path / 'runs'}\n"


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"resolved": 3}'])
def test_a_run_with_a_damaged_plan_is_listed_and_not_compared(
    content: str, record: Callable[..., Path], launch: Launch
) -> None:
    sound, damaged = record(), record()
    (damaged / "plan.json").write_text(content)
    assert damaged.name in launch("action=runs").out
    for words in (("action=replay", f"run={damaged.name}"), ("action=diff", f"runs=[{sound.name},{damaged.name}]")):
        made = launch(*words)
        assert made.code == 2
        assert made.err == f"error: run: {damaged / 'plan.json'} is damaged: it holds no plan. Choose another run.\n"


@pytest.mark.parametrize(
    ("content", "mistake"),
    [
        ("{", "no JSON"),
        ('{"environment": {"PATH": 3}}', "environment.PATH: Input should be a valid string"),
        ('{"packages": [1]}', "packages: Input should be an object"),
    ],
)
def test_a_run_with_a_damaged_lock_is_listed_and_not_compared(
    content: str, mistake: str, record: Callable[..., Path], launch: Launch
) -> None:
    sound, damaged = record(), record()
    (damaged / "lock.json").write_text(content)
    assert damaged.name in launch("action=runs").out
    for words in (("action=replay", f"run={damaged.name}"), ("action=diff", f"runs=[{sound.name},{damaged.name}]")):
        made = launch(*words)
        assert made.code == 2
        assert made.err == f"error: run: {damaged / 'lock.json'} is damaged ({mistake}). Choose another run.\n"


def ended(state: RunStateWriter) -> None:
    state.ended(3, "no memory")


def ready_and_silent(state: RunStateWriter) -> None:
    state.starting(1)
    state.ready()
    state.answers(False)


@pytest.mark.parametrize("action", ["chat", "adapters"])
@pytest.mark.parametrize(
    ("happened", "said"),
    [
        (None, "{run} never started a server. Type kt-launch replay run={run} to start it."),
        (ended, "{run} has ended (exit code 3: no memory). Type kt-launch replay run={run} to start it again."),
        (lambda _: None, "{run} is still starting. kt-launch status run={run} says when it is ready."),
        (ready_and_silent, "{run} has not answered for a while. kt-launch logs run={run} shows why."),
    ],
)
def test_a_run_that_does_not_answer_is_not_replaced_by_another_server(
    action: str,
    happened: Callable[[RunStateWriter], None] | None,
    said: str,
    record: Callable[..., Path],
    launch: Launch,
) -> None:
    earlier, folder = record(), record()
    RunStateWriter(earlier, "http://127.0.0.1:1").ended(0)
    if happened:
        happened(RunStateWriter(folder, "http://127.0.0.1:1"))
    for words in ([f"run={folder.name}"], [folder.name], ["run=latest"]):
        made = launch(action, *words)
        assert (made.code, made.out, made.err) == (2, "", f"error: run: {said.format(run=folder.name)}\n")


def test_logs_of_a_run_without_a_server_say_where_its_state_is(record: Callable[..., Path], launch: Launch) -> None:
    name = record().name
    assert launch("logs", name).err == (
        f"error: run: {name} has no server.log: no server was started. kt-launch status run={name} shows its state.\n"
    )


def test_a_chat_does_not_start_the_demo_beside_a_server_that_is_starting(
    record: Callable[..., Path], launch: Launch
) -> None:
    folder = record()
    RunStateWriter(folder, "http://127.0.0.1:1")
    made = launch("chat")
    assert (made.code, made.err.count("\n")) == (2, 1) and f"{folder.name} is still starting" in made.err


def test_a_run_kept_elsewhere_is_named_as_a_shell_reads_it(
    record: Callable[..., Path], launch: Launch, tmp_path: Path
) -> None:
    folder = record()
    elsewhere = tmp_path / "Jörg's runs"
    elsewhere.mkdir()
    folder.rename(elsewhere / folder.name)
    said = launch("chat", f"paths.runs={elsewhere}", f"run={folder.name}").err
    command = said.partition("Type ")[2].partition(" to start")[0]
    assert shlex.split(command) == ["kt-launch", "replay", f"run={elsewhere / folder.name}"]


def test_what_differs_between_two_runs(record: Callable[..., Path], launch: Launch, tmp_path: Path) -> None:
    lora = write_adapter(tmp_path / "lora")
    one = record(f"lora.path={lora}", "kt.cpuinfer=1")
    file = lora / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    other = record(f"lora.path={lora}", "server.context_length=64")
    shown = launch("action=diff", f"runs=[{one.name},{other}]").out
    keys = [line.split("  ")[0] for line in shown.splitlines()[1:] if not line.startswith(" ")]
    assert "files lora/adapter_model.safetensors" in keys
    assert "{" not in shown and "…" in shown
    whole = json.loads(launch("action=diff", f"runs=[{one.name},{other}]", "format=json").out)
    (hashes,) = [row for row in whole if row["what"] == f"files {file}"]
    assert len(hashes["one"]) == len("sha256:") + 64
    assert "server.context_length" in keys
    assert "model.path" not in keys
    assert "server.port" not in keys


def test_runs_without_difference(record: Callable[..., Path], launch: Launch) -> None:
    one, other = record(), record()
    shown = launch("action=diff", f"runs=[{one.name},{other.name}]").out
    assert shown == f"{one.name} and {other.name} are the same except for server.port, run.folder, fit.free\n"


def test_an_unknown_run_offers_the_nearest(record: Callable[..., Path], launch: Launch) -> None:
    name = record().name
    shown = launch("action=diff", f"runs=[{name},{name[:-1]}]")
    assert shown.code == 2
    assert f"Did you mean {name}?" in shown.err


def test_a_diff_needs_two_runs(launch: Launch) -> None:
    shown, fix = launch("action=diff", "runs=[a]"), "Type kt-launch diff ONE OTHER; kt-launch runs lists them."
    assert (shown.code, shown.err) == (2, f"error: runs: 1 given, 2 are expected. {fix}\n")


def test_a_replay_with_overrides_is_planned_anew_and_shows_what_they_change(
    record: Callable[..., Path], launch: Launch, adapter: Path
) -> None:
    run = record(f"lora.path={adapter}", "kt.cpuinfer=1", "server.context_length=64")
    own = ("replay", f"run={run.name}", "replay.start=false", "server.context_length=128")
    made = launch(*own)
    assert made.code == 0, made.err
    assert re.search(r"^server\.context_length +64 +128$", made.out, re.MULTILINE)
    assert "kt.cpuinfer" not in made.out and "lora.west.path" not in made.out
    rows = {row["what"]: row for row in json.loads(launch(*own, "--json").out)}
    assert (rows["server.context_length"]["then"], rows["server.context_length"]["now"]) == ("64", "128")
    bare = {row["what"]: row["now"] for row in json.loads(launch(*own, "lora=none", "--json").out)}
    assert bare["lora.west.path"] == "-"
    wrong = launch(*own, "kt.cpuinfer=100000")
    assert (wrong.code, wrong.err.startswith("error: kt.cpuinfer: 100000 threads, but 1 to ")) == (2, True)
    gone = run / "plan.json"
    gone.write_text(gone.read_text().replace('"context_length": 64', '"context_length": 4000'))
    gone = launch("replay", f"run={run.name}", "replay.start=false", "kt.cpuinfer=1")
    assert (
        f"server.context_length: 4000 tokens, but the model was made for 512 (config file: {run}/plan.json)" in gone.err
    )


def test_a_replay_prepares_what_its_server_needs_unless_it_only_reports(
    record: Callable[..., Path], launch: Launch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[LaunchPlan] = []

    def start(plan: LaunchPlan, *_: Any) -> int:
        started.append(plan)
        return 0

    record()
    monkeypatch.setattr(replay, "start", start)
    monkeypatch.setenv("KT_LAUNCH_CACHE", str(tmp_path / "cache"))
    words = ("replay", "kt.method=int8", "kt.prepare=true")
    shown = launch(*words, "replay.start=false")
    assert (shown.code, started) == (0, []), shown.err
    assert not (tmp_path / "cache" / "weights").exists()
    assert launch(*words).code == 0
    (plan,) = started
    assert [*Path(plan.value("kt.weight_path")).glob("*.safetensors")]
