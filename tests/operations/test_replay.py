"""A run is repeated with the same command and environment from any folder, and what differs today is named."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kt_launch.gathering.replan import command_differences, replan
from kt_launch.planning import command
from kt_launch.runs.lock import plan_digest
from kt_model import contract, digests
from kt_model.digests import Digests

Operations = Any


def differing(done: Any) -> list[str]:
    return [line.removeprefix("differs: ") for line in done.stdout.splitlines() if line.startswith("differs: ")]


def test_the_same_command_folder_and_environment(operations: Operations) -> None:
    os.environ["OMP_PROC_BIND"] = "close"
    try:
        recorded = operations.recorded()
    finally:
        del os.environ["OMP_PROC_BIND"]
    operations.env = {"NCCL_DEBUG": "INFO"}
    done = operations.start("action=replay", "detach=true")
    assert done.returncode == 0, done.stderr
    run = operations.latest()
    assert run.folder != recorded.folder
    assert run.plan["argv"] == recorded.plan["argv"]
    assert run.plan["env"] == recorded.plan["env"]
    seen = json.loads((run.folder / "environment.1.json").read_text())
    assert (seen["OMP_PROC_BIND"], seen["OMP_NUM_THREADS"]) == ("close", "1")
    assert "NCCL_DEBUG" not in seen
    assert seen["cwd"] == recorded.lock["folder"] == str(Path.cwd())
    assert differing(done) == [
        "environment OMP_PROC_BIND: close then, absent now",
        "environment NCCL_DEBUG: absent then, INFO now",
    ]
    assert run.lock["replay of"] == str(recorded.folder)
    assert run.lock["folder"] == recorded.lock["folder"]
    assert run.lock["environment"]["OMP_PROC_BIND"] == "close"
    assert "NCCL_DEBUG" not in run.lock["environment"]
    assert operations.call("action=stop").returncode == 0


def test_a_replay_is_replayed_from_any_folder_too(operations: Operations, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that was started with a relative path; its own folder of runs may be a relative one."""
    plan = operations.plan()
    monkeypatch.chdir(operations.root)
    relative = {"model": plan.config["model"] | {"path": "model"}}
    recorded = operations.record(replace(plan, config=plan.config | relative))
    for _turn in range(2):
        done = operations.call("action=replay", "detach=true", "paths.runs=../runs")
        assert done.returncode == 0, done.stderr
        run = operations.latest()
        assert (run.plan["argv"], run.lock["folder"]) == (recorded.plan["argv"], str(operations.root))
        assert operations.call("action=stop").returncode == 0
    assert len(list(operations.runs.iterdir())) == 3


def test_one_changed_byte_in_the_adapter_is_found_and_named(
    operations: Operations, changed_byte: Callable[[Path], None]
) -> None:
    operations.recorded()
    assert "nothing differs today" in operations.call("action=replay", "replay.start=false").stdout
    file = operations.root / "west" / "adapter_model.safetensors"
    changed_byte(file)
    (difference,) = differing(operations.call("action=replay", "replay.start=false"))
    assert difference.startswith(f"adapter west: {file}: sha256:")
    strict = operations.call("action=replay", "replay.strict=true")
    assert strict.returncode == 2
    assert f"error: replay.strict: adapter west: {file}" in strict.stderr
    assert strict.stderr.endswith(" now. Restore it, or set replay.strict=false.\n")
    assert len(list(operations.runs.iterdir())) == 1


def test_a_plan_alone_is_not_called_the_same(operations: Operations) -> None:
    run = operations.recorded()
    (run.folder / "lock.json").unlink()
    done = operations.call("action=replay", "replay.start=false")
    assert (done.returncode, done.stdout) == (0, f"replay of {run.name}: what differs today is unknown\n")
    assert "no hashes of its files" in done.stderr


def test_a_missing_file_and_an_added_file_are_named(operations: Operations) -> None:
    operations.recorded()
    (operations.root / "model" / "tokenizer.json").write_text("{}")
    (operations.root / "west" / "adapter_config.json").unlink()
    found = differing(operations.call("action=replay", "replay.start=false"))
    assert any(line.startswith("adapter west: ") and line.endswith("absent now") for line in found)
    assert any("tokenizer.json: absent then" in line for line in found)


def test_a_replay_that_cannot_be_the_same_is_refused(operations: Operations) -> None:
    recorded = operations.recorded()
    (operations.root / "west").rename(operations.root / "gone")
    gone = operations.call("action=replay", f"run={recorded.name}")
    assert gone.returncode == 2
    assert f"replay: {operations.root / 'west'} no longer exists" in gone.stderr


def edit(run: Any, **changes: Any) -> None:
    file = run.folder / "plan.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_an_edited_plan_is_named(operations: Operations) -> None:
    run = operations.recorded()
    edit(run, argv=[*run.plan["argv"], "--host", "0.0.0.0"])
    done = operations.call("action=replay", "replay.strict=true")
    assert done.returncode == 2
    assert "error: replay.strict: plan plan.json: sha256:" in done.stderr
    assert len(list(operations.runs.iterdir())) == 1


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "an address": (
        lambda plan: plan["argv"].__setitem__(plan["argv"].index("127.0.0.1"), "0.0.0.0"),
        "run: argument --host: 0.0.0.0 then, 127.0.0.1 now by its config. Look at ",
    ),
    "the same twice": (
        lambda plan: plan["argv"].extend(["--host", "0.0.0.0"]),
        "run: argument --host: 127.0.0.1 and again 0.0.0.0 then, 127.0.0.1 now by its config. ",
    ),
    "a flag": (
        lambda plan: plan["argv"].append("--trust-remote-code"),
        "run: argument --trust-remote-code: given then, absent now by its config. ",
    ),
    "a variable": (
        lambda plan: plan["env"].update(KT_LAUNCH_LORA_OPTIONS='{"allow": ["/"]}'),
        'run: environment KT_LAUNCH_LORA_OPTIONS: {"allow": ["/"]} then, {"allow": ["/',
    ),
    "a value that the config has": (
        lambda plan: plan["resolved"]["server.host"].update(value="0.0.0.0"),
        "",
    ),
    "the config too": (
        lambda plan: (plan["argv"].append("--skip-tokenizer-init"), plan["config"]["server"].update(host="0.0.0.0")),
        "run: plan server.host: possible then, 0.0.0.0 is open to other machines, and no key is required now",
    ),
    "a checkpoint's code": (
        lambda plan: plan["config"]["model"].update(trust_remote_code=True),
        "run: its config has model.trust_remote_code=true, which a run folder alone does not allow. Type kt-launch ",
    ),
    "a server for all": (
        lambda plan: plan["config"]["server"].update(open=True, host="0.0.0.0"),
        "run: its config has server.open=true, which a run folder alone does not allow. Type kt-launch replay run=",
    ),
}


@pytest.mark.parametrize("what", EDITS)
def test_a_plan_that_its_config_does_not_give_is_refused(operations: Operations, what: str) -> None:
    """Also where the digest of the lock was made to fit."""
    run, (change, message) = operations.recorded(), EDITS[what]
    change(plan := run.plan)
    edit(run, **plan)
    lock = json.loads((run.folder / "lock.json").read_text()) | plan_digest(run.folder)
    (run.folder / "lock.json").write_text(json.dumps(lock))
    done = operations.call("action=replay", "detach=true")
    if not message:
        assert done.returncode == 0, done.stderr
        assert operations.call("action=stop").returncode == 0
        return
    assert done.returncode == 2
    assert f"error: {message}" in done.stderr
    assert len(list(operations.runs.iterdir())) == 1


def test_what_a_config_left_open_stays_as_it_was(operations: Operations, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was given by a root, by a training run's newest checkpoint, or by the machine."""
    operations.plan()
    shutil.copytree(operations.root / "west", operations.root / "roots" / "run" / "checkpoint-4")
    monkeypatch.setenv("KT_LAUNCH_LORAS", str(operations.root / "roots"))
    words = {"adapters": {"run": {"folder": "run", "layout": "rank_major"}}, "max_rank": 9, "ignore": ["attention"]}
    plan = operations.plan(lora=words, server={"extra_args": ["--log-level", "debug"]}, kt={})
    monkeypatch.delenv("KT_LAUNCH_LORAS")
    shutil.copytree(operations.root / "west", operations.root / "roots" / "run" / "checkpoint-5")
    with socket.create_server(("127.0.0.1", plan.value("server.port"))):
        again = replan(plan)
    assert plan.adapters["run"].endswith("checkpoint-4")
    assert (command_differences(plan, again), again.argv, again.env) == ([], plan.argv, plan.env)
    mixed = replace(plan, argv=(*plan.argv[:4], *plan.argv[6:], *plan.argv[4:6]))
    assert command_differences(mixed, again) == [("arguments", "another order", "the usual one")]


def test_a_run_is_data_and_starts_nothing_of_its_own(operations: Operations) -> None:
    run = operations.recorded()
    mark = operations.root / "mark"
    thief = operations.root / "thief"
    thief.write_text(f"#!/bin/sh\ntouch {mark}\n")
    thief.chmod(0o755)
    lock = json.loads((run.folder / "lock.json").read_text())
    theirs = {"LD_PRELOAD": "/tmp/theirs.so", "PYTHONSTARTUP": "/tmp/theirs.py", "TRITON_CACHE_DIR": "/tmp"}
    lock["environment"] |= theirs
    (run.folder / "lock.json").write_text(json.dumps(lock))
    edit(run, argv=[str(thief), *run.plan["argv"][1:]])
    done = operations.call("action=replay", "detach=true")
    assert done.returncode == 0, done.stderr
    started = operations.latest()
    assert not mark.exists()
    assert started.plan["argv"][0] == sys.executable
    seen = json.loads((started.folder / "environment.1.json").read_text())
    assert not theirs.items() & seen.items()
    assert operations.call("action=stop").returncode == 0


def test_every_variable_that_a_plan_sets_may_be_in_a_recorded_one() -> None:
    shared = {str(value) for name, value in vars(command).items() if hasattr(contract, name)}
    assert {value for value in shared if re.fullmatch("[A-Z_]+", value)} == contract.PLAN_VARIABLES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"argv": ["python", "-c", "import os"]}, "run: its command is not a kt-launch server: python -c import os"),
        ({"env": {"LD_PRELOAD": "/tmp/theirs.so"}}, "run: its plan sets LD_PRELOAD, which kt-launch never does"),
    ],
)
def test_a_plan_that_no_launch_has_written_is_refused(
    operations: Operations, changes: dict[str, Any], message: str
) -> None:
    edit(operations.recorded(), **changes)
    done = operations.call("action=replay")
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_a_run_that_others_may_write_is_refused(operations: Operations) -> None:
    run = operations.recorded()
    run.folder.chmod(0o777)
    done = operations.call("action=replay")
    assert done.returncode == 2
    assert f"run: others than you may write {run.folder}. Look at what it holds" in done.stderr
    run.folder.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(run.folder / "lock.json", 65534, -1)
        assert f"run: {run.folder / 'lock.json'} belongs to another user" in operations.call("action=replay").stderr


def test_a_port_that_is_taken_is_named_with_its_owner(operations: Operations) -> None:
    recorded = operations.recorded()
    port = recorded.plan["resolved"]["server.port"]["value"]
    with socket.create_server(("127.0.0.1", port)):
        done = operations.call("action=replay", f"run={recorded.folder}")
        message = operations.call("action=replay", f"run={recorded.folder}", "replay.start=false")
    assert (message.returncode, message.stdout) == (0, f"replay of {recorded.name}: nothing differs today\n")
    assert done.returncode == 2
    assert f"server.port: {port}, which the run used, cannot be used: process {os.getpid()}" in done.stderr


def test_large_files_are_read_once(
    tmp_path: Path, changed_byte: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_NS", 3600 * 10**9)  # however long this process was kept waiting
    file, cache = tmp_path / "big.safetensors", tmp_path / "cache" / "digests.json"
    file.write_bytes(b"x" * 1000)
    with Digests(cache) as fresh:
        first = fresh.sha256(file)
    assert not cache.exists(), "a file that has just been written may change within the clock's tick"
    status = file.stat()
    content = {"stamp": [status.st_size, status.st_mtime_ns, status.st_ctime_ns], "sha256": first}
    cache.parent.mkdir()
    cache.write_text(json.dumps({f"{status.st_dev}:{status.st_ino}": content}))
    with Digests(cache) as remembered:
        assert remembered.sha256(file) == first
        assert remembered.bytes_read == 0
    changed_byte(file)
    with Digests(cache) as again:
        assert again.sha256(file) != first
        assert again.bytes_read == 1000
