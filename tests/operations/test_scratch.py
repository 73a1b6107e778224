"""Temporary folders and shared memory of servers: what nobody uses any more goes at the next start, all else stays."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from launching import ended_with_the_test

from kt_launch.machine.shared_memory import SHARED, shared_files_of
from kt_launch.runs.scratch import OWNER, remove_abandoned, scratch
from kt_launch.runs.shared_record import SharedRecord

START = secrets.token_hex(16)
HOLD = f"""
from kt_launch.runs.scratch import scratch
with scratch("{START}") as made:
    print(made.environment["TMPDIR"], flush=True)
    while pid := input():
        made.shared.look([int(pid)])
        print(flush=True)
"""
USE = """
import mmap, setproctitle, sys
files = [open(path, "r+b") for path in sys.argv[1:]]
mapped = [mmap.mmap(file.fileno(), 0) for file in files]
[file.close() for file in files]
setproctitle.setproctitle("sglang::scheduler")
print(flush=True)
input()
"""
"""A process that uses files as SGLang's do: by the title that it gives itself, its environment is overwritten."""


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


@contextlib.contextmanager
def using(*files: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of a server that has mapped these files."""
    command = [sys.executable, "-P", "-c", USE, *map(str, files)]
    environment = {**os.environ, "KT_LAUNCH_START": START}
    started = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    with ended_with_the_test(started) as process:
        assert process.stdout is not None and process.stdout.readline() == "\n"
        yield process
        process.kill()


def look(process: subprocess.Popen[str], at: int) -> None:
    """The launcher looks at what a process of its server uses."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{at}\n")
    process.stdin.flush()
    assert process.stdout.readline() == "\n"


@contextlib.contextmanager
def in_shared_memory(name: str) -> Iterator[Path]:
    """A file of this name, gone with the test."""
    file = SHARED / name
    file.write_bytes(b"left")
    yield file
    file.unlink(missing_ok=True)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A file in shared memory that has no number of a start."""
    with in_shared_memory(f"kt-launch-test-{secrets.token_hex(8)}") as file:
        yield file


@pytest.fixture
def numbered() -> Iterator[Path]:
    """One that has."""
    with in_shared_memory(f"sglang_loads_{START}_0011aabb.shm") as file:
        yield file


def test_the_folder_of_a_living_launcher_stays_and_goes_with_it(
    launcher: tuple[subprocess.Popen[str], Path], numbered: Path
) -> None:
    process, folder = launcher
    remove_abandoned()
    assert folder.is_dir() and numbered.is_file()
    process.communicate("\n", timeout=300)
    assert not folder.exists()
    assert shared_files_of(START) == set()


def test_the_folder_of_a_killed_launcher_goes_when_its_server_is_gone(
    launcher: tuple[subprocess.Popen[str], Path], temporary: Path
) -> None:
    process, folder = launcher
    (folder / "socket").touch()
    (temporary / "bystander").touch()
    process.kill()
    process.wait(timeout=300)
    started = subprocess.Popen(["sleep", "600"], env={"TMPDIR": str(folder), "PATH": "/usr/bin:/bin"})
    with ended_with_the_test(started) as server:
        remove_abandoned()
        assert (folder / "socket").is_file()
        server.kill()
    with scratch(secrets.token_hex(16)):
        assert not folder.exists()
    assert [path.name for path in temporary.iterdir()] == ["bystander"]


@pytest.mark.parametrize("folder_is", ["where it was", "gone", "elsewhere"])
def test_shared_memory_of_a_killed_launcher_goes_whatever_became_of_its_folder(
    launcher: tuple[subprocess.Popen[str], Path],
    numbered: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    folder_is: str,
) -> None:
    """What bears the number of the start, and what does not and was seen in use."""
    process, folder = launcher
    if folder_is == "gone":
        shutil.rmtree(folder)
    if folder_is == "elsewhere":
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("other")))
    seen = SHARED / f"kt-launch-test-{secrets.token_hex(8)}"
    seen.write_bytes(b"left")
    try:
        with using(numbered, seen) as server:
            look(process, server.pid)
            process.kill()
            process.wait(timeout=300)
            remove_abandoned()
            assert numbered.is_file() and seen.is_file(), "a process of that start lives"
        remove_abandoned()
        assert not seen.exists() and not folder.exists()
        assert shared_files_of(START) == set()
    finally:
        seen.unlink(missing_ok=True)


@pytest.mark.parametrize("launcher_is", ["alive", "killed"])
def test_what_another_container_has_in_shared_memory_stays_as_long_as_its_launcher_lives(
    launcher: tuple[subprocess.Popen[str], Path], numbered: Path, monkeypatch: pytest.MonkeyPatch, launcher_is: str
) -> None:
    """Containers that share /dev/shm see each other's locks, but not each other's processes. A server whose launcher is
    killed is killed with it."""
    process, folder = launcher
    with in_shared_memory(f"kt-launch-test-{secrets.token_hex(8)}") as seen, using(numbered, seen) as server:
        look(process, server.pid)
        if launcher_is == "killed":
            process.kill()
            process.wait(timeout=300)
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(psutil, "pids", list)
            elsewhere.setattr(psutil, "process_iter", lambda *_: iter(()))
            remove_abandoned()
        stays = launcher_is == "alive"
        assert {numbered.exists(), seen.exists(), folder.exists(), bool(shared_files_of(START))} == {stays}


def test_shared_memory_of_others_stays(shared: Path) -> None:
    """Of what a server has used: what was there before it, and what somebody else uses."""
    start = secrets.token_hex(16)
    with contextlib.ExitStack() as theirs:
        with SharedRecord(start) as record:
            late, own = (SHARED / f"kt-launch-test-{secrets.token_hex(8)}" for _ in range(2))
            for file in (late, own):
                file.write_bytes(b"made by the server, or meanwhile by somebody")
                theirs.callback(file.unlink, missing_ok=True)
            with using(shared, late, own) as server:
                record.look([server.pid])
            theirs.enter_context(using(late))
        assert (shared.is_file(), late.is_file(), own.exists()) == (True, True, False)
    assert shared_files_of(start) == set()


@pytest.mark.parametrize("number", ["", "s", "../../" + "a" * 26, "*" * 32])
def test_a_number_that_is_none_removes_nothing_else(temporary: Path, numbered: Path, number: str) -> None:
    folder = temporary / "kt-launch-made-up"
    folder.mkdir()
    (folder / OWNER).write_text(number)
    remove_abandoned()
    assert numbered.is_file() and not folder.exists()


def test_what_is_not_known_to_be_ours_stays(temporary: Path, shared: Path) -> None:
    (temporary / "kt-launch-notes").mkdir()
    (temporary / "kt-launch.service").touch()
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / OWNER).touch()
    (temporary / "kt-launch-link").symlink_to(elsewhere)
    remove_abandoned()
    kept = {"kt-launch-notes", "kt-launch.service", "kt-launch-link", "elsewhere"}
    assert {path.name for path in temporary.iterdir()} == kept
    assert (elsewhere / OWNER).is_file() and shared.is_file()


def test_a_record_removes_only_what_is_in_shared_memory_and_folders_that_say_so(temporary: Path) -> None:
    """Whatever stands in it; nobody but this user can have written it."""
    start = secrets.token_hex(16)
    victims = [temporary / "kt-launch-own", temporary / "file"]
    victims[0].mkdir()
    victims[1].touch()
    record = SHARED / f"kt-launch-{start}"
    record.write_bytes(b"".join(os.fsencode(f"{path}\n") for path in (*victims, SHARED / "../../etc", "", "\udcff")))
    remove_abandoned()
    assert not record.exists() and all(victim.exists() for victim in victims)


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_record_that_is_no_file_is_left_alone(temporary: Path, kind: str) -> None:
    record = SHARED / f"kt-launch-{secrets.token_hex(16)}"
    target = temporary / "target"
    target.write_text("kept")
    record.symlink_to(target) if kind == "link" else os.mkfifo(record)
    try:
        remove_abandoned()
        assert record.is_symlink() or record.is_fifo()
        assert target.read_text() == "kept"
    finally:
        record.unlink()
