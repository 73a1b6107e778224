"""A run is repeated with the same command and environment from any folder, and what differs today is named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    done = operations.call("action=replay", "detach=true")
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
    assert operations.call("action=stop").returncode == 0


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
    assert strict.stderr.endswith(" now. Bring it back, or type replay.strict=false.\n")
    assert len(list(operations.runs.iterdir())) == 1


def test_a_missing_file_and_an_added_file_are_named(operations: Operations) -> None:
    operations.recorded()
    (operations.root / "model" / "tokenizer.json").write_text("{}")
    (operations.root / "west" / "adapter_config.json").unlink()
    found = differing(operations.call("action=replay", "replay.start=false"))
    assert any(line.startswith("adapter west: ") and line.endswith("absent now") for line in found)
    assert any("tokenizer.json: absent then" in line for line in found)


def test_a_replay_that_cannot_be_the_same_is_refused(operations: Operations) -> None:
    recorded = operations.recorded()
    changed = operations.call("action=replay", "kt.cpuinfer=1")
    assert changed.returncode == 2
    assert "kt.cpuinfer: a replay changes nothing" in changed.stderr
    operations.interpreter.rename(operations.root / "gone")
    gone = operations.call("action=replay", f"run={recorded.name}")
    assert gone.returncode == 2
    assert f"replay: {operations.interpreter} is no longer there" in gone.stderr


def test_a_port_that_is_taken_is_named_with_its_owner(operations: Operations) -> None:
    import socket

    recorded = operations.recorded()
    port = recorded.plan["resolved"]["server.port"]["value"]
    with socket.create_server(("127.0.0.1", port)):
        done = operations.call("action=replay", f"run={recorded.folder}")
        message = operations.call("action=replay", f"run={recorded.folder}", "replay.start=false")
    assert (message.returncode, message.stdout) == (0, f"replay of {recorded.name}: nothing differs today\n")
    assert done.returncode == 2
    assert f"server.port: {port}, which the run had, cannot be used: process {os.getpid()}" in done.stderr


def test_large_files_are_read_once(tmp_path: Path, changed_byte: Callable[[Path], None]) -> None:
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
