"""The chaos run itself: an attempt that is named runs alone, and its report says how it went; `make chaos` is all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOMS = os.pathsep.join(str(HERE.parent / room) for room in ("support", "fixtures"))


def test_one_attempt_runs_alone_and_is_reported(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "chaos.py"), "--only", "readers:1", "--report", str(tmp_path / "report.json")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": ROOMS}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert {name: report[name] for name in ("tried", "survived", "wrong", "left behind", "kills")} == {
        "tried": 1, "survived": 1, "wrong": 0, "left behind": 0, "kills": 3,
    }  # fmt: skip
    assert [each["name"] for each in report["attempts"]] == ["readers:1"]
    assert "chaos: tried 1, survived 1, wrong 0, left behind 0, kills 3" in done.stdout
