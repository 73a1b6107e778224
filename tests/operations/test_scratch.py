"""Temporary folders of servers: those that nobody uses any more go at the next start, all others stay."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import ended_with_the_test

from kt_launch.runs.scratch import OWNER, note_shared, remove_abandoned, scratch_environment

START = "ab" * 12 + f"{os.getpid():08x}"
HOLD = f"""
from kt_launch.runs.scratch import *
with scratch_environment("{START}") as e: print(e['TMPDIR'], flush=True); input()
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system's folder for temporary files, for this process and those it starts."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def launcher(temporary: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that has such a folder, and the folder."""
    command = [sys.executable, "-P", "-c", HOLD]
    started = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with ended_with_the_test(started) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_the_folder_of_a_living_launcher_stays_and_goes_with_it(launcher: tuple[subprocess.Popen[str], Path]) -> None:
    process, folder = launcher
    remove_abandoned()
    assert folder.is_dir()
    process.communicate("\n", timeout=300)
    assert not folder.exists()


def test_the_folder_of_a_killed_launcher_goes_when_its_server_is_gone(
    launcher: tuple[subprocess.Popen[str], Path], temporary: Path
) -> None:
    process, folder = launcher
    (folder / "socket").touch()
    shared = Path("/dev/shm", f"kt-launch-test-{folder.name}")
    shared.write_bytes(b"left")
    note_shared({"TMPDIR": str(folder)}, [shared, temporary / "bystander"])
    (temporary / "bystander").touch()
    process.kill()
    process.wait(timeout=300)
    started = subprocess.Popen(["sleep", "600"], env={"TMPDIR": str(folder), "PATH": "/usr/bin:/bin"})
    with ended_with_the_test(started) as server:
        with scratch_environment():
            assert (folder / "socket").is_file() and shared.is_file()
        server.kill()
    with scratch_environment():
        assert not folder.exists() and not shared.exists()
    assert [path.name for path in temporary.iterdir()] == ["bystander"]


@pytest.fixture
def early() -> Iterator[Path]:
    """What a server makes in shared memory and is killed, before anybody has seen that it has it."""
    file = Path("/dev/shm", f"sglang_loads_{START}_0011aabb.shm")
    file.write_bytes(b"left")
    yield file
    file.unlink(missing_ok=True)


def test_shared_memory_that_nobody_has_seen_goes_by_the_number_of_the_start(
    launcher: tuple[subprocess.Popen[str], Path], early: Path
) -> None:
    process, folder = launcher
    started = subprocess.Popen(["sleep", "600"], env={"KT_LAUNCH_START": START, "PATH": "/usr/bin:/bin"})
    with ended_with_the_test(started) as server:
        process.kill()
        process.wait(timeout=300)
        remove_abandoned()
        assert early.is_file() and folder.is_dir(), "the server of that start still lives"
        server.kill()
    remove_abandoned()
    assert not early.exists() and not folder.exists()


def test_it_goes_with_the_launcher_that_ends_in_order(
    launcher: tuple[subprocess.Popen[str], Path], early: Path
) -> None:
    launcher[0].communicate("\n", timeout=300)
    assert not early.exists()


@pytest.mark.parametrize("number", ["", "s", "../../" + "a" * 26, "*" * 32])
def test_a_number_that_is_none_removes_nothing_else(temporary: Path, early: Path, number: str) -> None:
    folder = temporary / "kt-launch-made-up"
    folder.mkdir()
    (folder / OWNER).write_text(number)
    remove_abandoned()
    assert early.is_file() and not folder.exists()


def test_what_is_not_known_to_be_ours_stays(temporary: Path) -> None:
    (temporary / "kt-launch-notes").mkdir()
    (temporary / "kt-launch.service").touch()
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / OWNER).touch()
    (temporary / "kt-launch-link").symlink_to(elsewhere)
    remove_abandoned()
    kept = {"kt-launch-notes", "kt-launch.service", "kt-launch-link", "elsewhere"}
    assert {path.name for path in temporary.iterdir()} == kept
    assert (elsewhere / OWNER).is_file()
