"""A command that is forked from the tests' process has nothing to do with what is open there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import forked_launcher
import pytest


def test_what_tests_have_open_is_no_file_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A logger of a package that was imported here keeps its stream, and the number of its file."""
    files = [tmp_path / f"own {number}" for number in range(20)]

    def command(words: Sequence[str]) -> int:
        with ExitStack() as opened:
            own = [opened.enter_context(file.open("w")) for file in files]
            theirs.write("said by a logger\n")
            theirs.close()
            for file in own:
                file.write("the command's")
        return 0

    monkeypatch.setattr(forked_launcher, "main", command)
    with (tmp_path / "theirs").open("w", buffering=1) as theirs:
        assert forked_launcher.call_forked((), tmp_path, {}, 60).returncode == 0
    assert {file.read_text() for file in files} == {"the command's"}
    assert (tmp_path / "theirs").read_text() == ""
