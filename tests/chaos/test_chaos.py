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
ROUNDS = """
import json
from chaos import LANES, Rounds, names_of
from outcomes import Outcome

lasts_s, rounds, free_s = {"commands": 7.0, "servers": 30.0}, Rounds(LANES, 7), dict.fromkeys(LANES, 0.0)
kinds = {kind: lane for lane, attempts in LANES.items() for kind in attempts}
taken = []
while len(taken) < len(kinds) + 100:
    lane = min(free_s, key=free_s.__getitem__)
    name = rounds.take(lane, 1e9)
    kind = name.partition(":")[0].partition("/")[0]
    taken.append([free_s[lane], lane, kinds[kind], name])
    free_s[lane] += lasts_s[kinds[kind]]
    rounds.note(Outcome(name, seconds=lasts_s[kinds[kind]]))
short = {lane: [rounds.take(lane, left_s) for left_s in (8.0, 3.0)] for lane in LANES}
print(json.dumps([{lane: names_of(attempts) for lane, attempts in LANES.items()}, taken, short, kinds]))
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


def test_no_phase_has_a_second_turn_before_all_have_had_one() -> None:
    """Two lanes, on a clock of their own: the one that is done first takes over from the other, so that both are busy
    until all had their turn; the last minutes go to what still fits into them."""
    names, taken, short, kinds = json.loads(run("-c", ROUNDS).stdout)
    every = [each for lane in names.values() for each in lane]
    first = taken[: len(every)]
    assert sorted(name.partition(":")[0] for *_, name in first) == sorted(every)
    assert len({name for *_, name in taken}) == len(taken)
    assert first[-1][0] <= sum(7 if of == "commands" else 30 for _, _, of, _ in first) / 2
    for lane, attempts in names.items():
        order = [_kind(name) for _, _, of, name in first if of == lane]
        lane_kinds = {_kind(each) for each in attempts}
        assert {*order[: len(lane_kinds) + 4]} == lane_kinds, order
    for fitting, nothing in short.values():
        assert kinds[_kind(fitting)] == "commands" and nothing is None


def _kind(name: str) -> str:
    return name.partition(":")[0].partition("/")[0]
