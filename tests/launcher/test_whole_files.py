"""Files that are there whole or not at all: what a writer left that was killed, and writers that are still at it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kt_model.atomic_file import whole_file

KILLED = """
import os, signal, sys
from pathlib import Path
from kt_model.atomic_file import whole_file

with whole_file(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_goes_with_the_next_writing(tmp_path: Path) -> None:
    target = tmp_path / "unit [1].service"
    target.write_bytes(b"before")
    done = subprocess.run([sys.executable, "-P", "-c", KILLED, str(target)])
    assert done.returncode == -signal.SIGKILL
    assert target.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 2
    with whole_file(target) as file:
        file.write(b"after")
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    assert target.read_bytes() == b"after"


def test_a_draft_that_is_being_written_and_files_of_others_stay(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    others = [
        tmp_path / name for name in ("state.json.old.tmp", "estate.json.01234567.tmp", "state.json.012345678.tmp")
    ]
    for other in others:
        other.touch()
    with whole_file(target) as slow:
        slow.write(b"slow")
        with whole_file(target) as quick:
            quick.write(b"quick")
        assert target.read_bytes() == b"quick"
    assert target.read_bytes() == b"slow"
    assert {*tmp_path.iterdir()} == {target, *others}


def test_nothing_is_left_of_a_writing_that_failed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), whole_file(tmp_path / "file", private=True) as file:
        assert [oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()] == ["0o600"]
        file.write(b"half")
        raise ValueError("no")
    assert list(tmp_path.iterdir()) == []
