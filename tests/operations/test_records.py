"""Parts of a run's record: secrets, times, states, pauses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from launching import ended_with_the_test

from kt_launch.config.schema import Config, Server
from kt_launch.config.secrets import hide_config
from kt_launch.machine.process_identity import ProcessIdentity
from kt_launch.runs.lock import SET, packages, read_environment
from kt_launch.runs.runs import Run, read_runs
from kt_launch.runs.state import ENDED, RunStateWriter, read_state
from kt_launch.watching.progress import Progress, expect_phases, time_left
from kt_launch.watching.supervision import Ending, free_bytes, pause_before, supervise, wait_for_room
from kt_model.errors import ServerDidNotStart
from kt_model.redaction import hide_arguments, hide_typed, is_secret, mask, references, show_arguments

Operations = Any


@pytest.mark.parametrize(
    ("typed", "hidden"),
    [
        ("server.extra_args=[--api-key,abc,--log-level,info]", "server.extra_args=[--api-key,{},--log-level,info]"),
        ("server.extra_args=[--api-key=abc]", "server.extra_args=[--api-key={}]"),
        ("server.extra_args=['--api-key','abc']", "server.extra_args=['--api-key',{}]"),
        ("server.extra_args=[--api-key,'abc']", "server.extra_args=[--api-key,{}]"),
    ],
)
def test_a_secret_is_hidden_as_it_is_typed(typed: str, hidden: str) -> None:
    environ: dict[str, str] = {}
    (found,) = hide_typed([typed], environ)
    assert found.replace("'env:KT_LAUNCH_API_KEY'", "env:KT_LAUNCH_API_KEY") == hidden.format("env:KT_LAUNCH_API_KEY")
    assert environ == {"KT_LAUNCH_API_KEY": "abc"}


def test_what_is_no_secret_stays() -> None:
    typed = ["server.extra_args=[--max-total-tokens,5,--tokenizer-path,/x,--skip-tokenizer-init]", "kt.cpuinfer=4"]
    assert hide_typed(typed, {}) == typed


def test_two_secrets_of_one_name_are_kept_apart() -> None:
    environ: dict[str, str] = {}
    hidden = hide_typed(["server.extra_args=[--api-key,one]", "server.extra_args=[--api-key,two]"], environ)
    assert sorted(environ.values()) == ["one", "two"]
    assert hidden[0] != hidden[1]


def test_secrets_of_presets_are_hidden_and_come_back_in_the_server() -> None:
    environ: dict[str, str] = {}
    words = ["--api-key", "abc", "--admin-api-key=def", "--log-level", "info"]
    config = hide_config(Config(server=Server(extra_args=words)), environ)
    assert "abc" not in config.model_dump_json() and "def" not in config.model_dump_json()
    assert references(config.server.extra_args) == ["KT_LAUNCH_API_KEY", "KT_LAUNCH_ADMIN_API_KEY"]
    assert show_arguments(config.server.extra_args, environ) == words
    with pytest.raises(KeyError, match="KT_LAUNCH_API_KEY"):
        show_arguments(config.server.extra_args, {})


def test_the_names_of_a_runs_adapters_are_whole(tmp_path: Path) -> None:
    resolved = {f"lora.{key}": {"value": "/x"} for key in ("v1.2.path", "v1.2.rank", "a.path", "max_rank")}
    assert Run(tmp_path, {"resolved": resolved}, {}).adapters == ["a", "v1.2"]


def test_a_reference_may_be_typed() -> None:
    assert hide_arguments(["--api-key", "env:MINE"], {}) == ["--api-key", "env:MINE"]


def test_names_of_secrets() -> None:
    assert [name for name in ("HF_TOKEN", "OPENAI_API_KEY", "SSH_AUTH_SOCK", "PASSWORD") if not is_secret(name)] == []
    assert [name for name in ("TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS", "KEYBOARD", "PATH") if is_secret(name)] == []


def test_the_environment_is_recorded_without_secrets_and_without_what_does_not_matter() -> None:
    environ = {
        "HF_TOKEN": "hf_abc",
        "HF_HOME": "/cache",
        "CUDA_VISIBLE_DEVICES": "3",
        "https_proxy": "http://me:secret@proxy:3128",
        "KT_LAUNCH_RUNS": "/runs",
        "EDITOR": "vi",
        "DATABASE": "postgres://me:secret@db",
    }
    assert read_environment(environ) == {
        "CUDA_VISIBLE_DEVICES": "3",
        "HF_HOME": "/cache",
        "HF_TOKEN": SET,
        "https_proxy": "http://***@proxy:3128",
    }


def test_the_server_logs_no_secret(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setenv("KT_LAUNCH_API_KEY", "sk-abcdef")
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    from kt_sglang.process.secrets import hide_in_output

    hide_in_output()
    print("server_args=ServerArgs(api_key='sk-abcdef')")
    print("Authorization: Bearer sk-abcdef", file=sys.stderr)
    said = capsys.readouterr()
    assert said.out == "server_args=ServerArgs(api_key='***')\n"
    assert said.err == "Authorization: Bearer ***\n"
    assert mask("http://user:word@host/x", []) == "http://***@host/x"


def test_no_file_of_a_run_holds_a_secret(operations: Operations) -> None:
    operations.recorded()
    from tiny_files import write_checkpoint

    checkpoint = write_checkpoint(operations.root / "other")
    words = ("model=auto", f"model.path={checkpoint}", "server=cpu", "server.extra_args=[--api-key,sk-hush-hush]")
    done = operations.call(*words, "server.start_timeout_s=0.1", HF_TOKEN="hf-hush-hush", PYTHONPATH="")
    assert done.returncode == 3, done.stderr
    files = [file for file in operations.latest().folder.rglob("*") if file.is_file()]
    assert {"plan.json", "lock.json", "server.log", "state.json"} <= {file.name for file in files}
    assert [file for file in files if b"hush-hush" in file.read_bytes()] == []
    assert "hush-hush" not in done.stdout + done.stderr
    assert "--api-key" in operations.latest().plan["argv"]


def test_the_time_that_is_left_is_learnt_from_earlier_runs(operations: Operations, capsys: Any) -> None:
    for ready in (10.0, 30.0, 20.0):
        run = operations.recorded()
        (run.folder / "timings.json").write_text(json.dumps({"start": 0.0, "weights": ready / 2, "ready": ready}))
    run = operations.recorded()
    from kt_model.plan import LaunchPlan

    plan = LaunchPlan.read(run.folder / "plan.json")
    expected = expect_phases(plan, run.folder)
    assert expected == {"start": 0.0, "weights": 10.0, "ready": 20.0}
    assert time_left(expected, "weights", elapsed=13.0, phase_began=11.0) == 8.0
    assert time_left(expected, "weights", elapsed=60.0, phase_began=11.0) == 0.0
    assert time_left(expected, "proof", elapsed=1.0, phase_began=0.5) is None
    with Progress(plan, run.folder) as progress:
        progress.log_line("[2026-11-23 08:59:30] Load weight begin. avail mem=19.61 GB")
    assert "start (ready in about 20 s)" in capsys.readouterr().err
    assert set(json.loads((run.folder / "timings.json").read_text())) == {"start", "weights"}


def test_runs_of_other_models_or_machines_teach_nothing(operations: Operations) -> None:
    from kt_model.plan import LaunchPlan

    other_host, other_model, run = (operations.recorded() for _ in range(3))
    for earlier in (other_host, other_model):
        (earlier.folder / "timings.json").write_text('{"start": 0.0, "ready": 5.0}')
    lock = other_host.lock | {"machine": {"name": "elsewhere"}}
    (other_host.folder / "lock.json").write_text(json.dumps(lock))
    changed = json.loads((other_model.folder / "plan.json").read_text())
    changed["resolved"]["model.path"]["value"] = "/another"
    (other_model.folder / "plan.json").write_text(json.dumps(changed))
    assert expect_phases(LaunchPlan.read(run.folder / "plan.json"), run.folder) == {}


def test_pauses_grow_and_are_capped() -> None:
    assert [pause_before(n) for n in (1, 2, 3, 4, 7, 8, 500)] == [1, 2, 4, 8, 60, 60, 60]


def test_supervision_counts_pauses_and_gives_up() -> None:
    pauses: list[float] = []
    endings = iter([Ending(9, 5.0), Ending(9, 5.0), Ending(9, 1000.0), Ending(9, 5.0)])
    assert supervise(lambda: next(endings), 3, pauses.append) == 9
    assert pauses == [1, 2, 1]
    assert supervise(lambda: Ending(0, 5.0), 3, pauses.append) == 0
    assert supervise(lambda: Ending(9, 5.0, configuration=True), 3, pauses.append) == 9
    assert len(pauses) == 3


def test_a_server_is_started_again_once_its_disk_has_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pauses: list[float] = []
    rooms = iter([0, 4096, 1 << 20])
    wait_for_room(tmp_path, pauses.append, lambda _: next(rooms))
    assert pauses == [2.0, 2.0]
    told = f"kt-launch: the disk of {tmp_path} is full: the server is started once it has room\n"
    assert capsys.readouterr().err == told
    for room in (None, 1 << 40):
        wait_for_room(tmp_path, pauses.append, lambda _, room=room: room)  # type: ignore[misc]
    wait_for_room(tmp_path / "gone", pauses.append)
    assert len(pauses) == 2 and (free_bytes(tmp_path) or 0) > 0


def test_an_hour_of_health_refills_the_restarts() -> None:
    pauses: list[float] = []
    endings = iter([Ending(9, 5.0), Ending(9, 5.0), Ending(9, 3600.0), Ending(9, 5.0), Ending(9, 5.0)])
    assert supervise(lambda: next(endings), 2, pauses.append) == 9
    assert pauses == [1, 2, 1, 2]


def test_supervision_never_repeats_a_first_start() -> None:
    starts: list[int] = []

    def fail() -> Ending:
        starts.append(1)
        raise ServerDidNotStart("server", "no")

    with pytest.raises(ServerDidNotStart):
        supervise(fail, 5, lambda _: None)
    assert len(starts) == 1


def test_a_process_is_known_by_more_than_its_number(tmp_path: Path) -> None:
    mark = ProcessIdentity.of(os.getpid())
    assert mark.alive and not mark.replaced
    assert not ProcessIdentity(mark.pid, mark.start_ticks - 1, mark.boot).alive
    assert ProcessIdentity(mark.pid, mark.start_ticks - 1, mark.boot).replaced
    assert not ProcessIdentity(mark.pid, mark.start_ticks, "another boot").alive
    writer = RunStateWriter(tmp_path, "http://x")
    writer.starting(os.getpid())
    writer.ready()
    state = read_state(tmp_path)
    assert state is not None and (state.now, state.lives, state.restarts) == ("ready", True, 0)
    writer.ended(0)
    assert read_state(tmp_path).state == ENDED  # type: ignore[union-attr]
    (tmp_path / "state.json").write_text("{")
    assert read_state(tmp_path) is None


def test_packages_inside_of_packages_are_not_the_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray puts a folder of its own on sys.path, when a sweep has imported it."""
    for folder in (tmp_path / "site-packages/ray/thirdparty_files", tmp_path / "more/site-packages"):
        made = folder / f"of_{folder.name.replace('-', '_')}-1.dist-info"
        made.mkdir(parents=True)
        (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {made.name.partition('-')[0]}\nVersion: 1\n")
        monkeypatch.syspath_prepend(folder)
    found = packages()
    assert "of_thirdparty_files" not in found and found["of_site_packages"] == "1" and "pytest" in found


COMES_AND_GOES = """
import pathlib, shutil, sys
folder = pathlib.Path(sys.argv[1])
while True:
    folder.mkdir()
    (folder / "plan.json").write_text("{}")
    shutil.rmtree(folder)
"""


def test_runs_are_listed_while_others_are_being_made_and_removed(tmp_path: Path) -> None:
    (tmp_path / "stays").mkdir()
    (tmp_path / "stays" / "plan.json").write_text("{}")
    other = subprocess.Popen([sys.executable, "-c", COMES_AND_GOES, str(tmp_path / "passes")])
    with ended_with_the_test(other):
        found: set[str] = set()
        deadline = time.monotonic() + 240
        while "passes" not in found and time.monotonic() < deadline:
            found = set.union(*({run.name for run in read_runs(tmp_path)} for _ in range(1000)))
        other.kill()
    assert found == {"passes", "stays"}
