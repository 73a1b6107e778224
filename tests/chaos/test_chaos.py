"""The chaos run itself: an attempt that is named runs alone, and its report says how it went; `make chaos` is all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOMS = os.pathsep.join(str(each) for each in (HERE, HERE.parent / "support", HERE.parent / "fixtures"))
ROUND = """
import itertools, json
from chaos import LANES, endless, names_of
print(json.dumps({
    lane: [list(attempts), names_of(attempts), list(itertools.islice(endless(lane, 7), len(names_of(attempts))))]
    for lane, attempts in LANES.items()
}))
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": ROOMS}, capture_output=True, text=True, timeout=300)


def test_one_attempt_runs_alone_and_is_reported(tmp_path: Path) -> None:
    """A command that is killed as it gives its file the name: run again, the same file, and nothing beside it."""
    done = run(str(HERE / "chaos.py"), "--only", "export/renaming:1", "--report", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert {name: report[name] for name in ("tried", "survived", "wrong", "left behind")} == {
        "tried": 1, "survived": 1, "wrong": 0, "left behind": 0,
    }  # fmt: skip
    assert [each["name"] for each in report["attempts"]] == ["export/renaming:1"]
    assert report["killed"]["export"]["renaming"] >= 1 and report["endings"] == {"resumed": 1}
    told = f"chaos: tried 1, survived 1, wrong 0, left behind 0, kills {report['kills']} in"
    assert told in done.stdout and "killed: export (" in done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--only", "quantise"), "error: --only: no attempt quantise. Did you mean quantize?"),
        (("--only", "port:"), "error: --only: nothing is no seed, expected a number after port:"),
        (("--only", "packing/renamig:3"), "error: --only: no attempt packing/renamig. Did you mean packing/renaming?"),
        (("--only", "merge:soon"), "error: --only: soon is no seed, expected a number after merge:"),
        (("--minutes", "0"), "error: --minutes: 0 is no time to run"),
        (("--report", "/no/such/folder/report.json"), "error: --report: there is no folder /no/such/folder"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(words: tuple[str, ...], told: str) -> None:
    done = run(str(HERE / "chaos.py"), *words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{told}\n")


def test_every_kind_has_its_turn_before_one_has_its_next() -> None:
    done = run("-c", ROUND)
    for kinds, names, order in json.loads(done.stdout).values():
        tried = [each.partition(":")[0] for each in order]
        assert sorted(tried) == sorted(names)
        assert {each.partition("/")[0] for each in tried[: len(kinds) + 4]} == {*kinds}, tried
