"""Temporary folders of servers: those that nobody uses any more go at the next start, all others stay."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kt_launch.runs.scratch import OWNER, note_shared, remove_abandoned, scratch_environment

HOLD = "from kt_launch.runs.scratch import *\nwith scratch_environment() as e: print(e['TMPDIR'], flush=True); input()"


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
    with subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_the_folder_of_a_living_launcher_stays_and_goes_with_it(launcher: tuple[subprocess.Popen[str], Path]) -> None:
    process, folder = launcher
    remove_abandoned()
    assert folder.is_dir()
    process.communicate("\n", timeout=60)
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
    process.wait(timeout=60)
    with subprocess.Popen(["sleep", "600"], env={"TMPDIR": str(folder), "PATH": "/usr/bin:/bin"}) as server:
        with scratch_environment():
            assert (folder / "socket").is_file() and shared.is_file()
        server.kill()
    with scratch_environment():
        assert not folder.exists() and not shared.exists()
    assert [path.name for path in temporary.iterdir()] == ["bystander"]


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
