"""A disk that is full, wherever the launcher writes: one line that names the file, exit code 2 or 3, within seconds,
and nothing that the next command would believe. A disk that gets full in the middle of weights is
tests/weights/test_full_disk.py's, under a server that runs tests/operations/test_living.py's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from small_disk import in_small_disk
from tiny_files import write_adapter, write_checkpoint

HERE = Path(__file__).parents[1] / "support" / "on_full_disk.py"
CASES: dict[str, tuple[int, tuple[str, ...], str]] = {
    "the run folder": (0, ("action=serve",), "plan.json: the disk is full"),
    "its plan": (8, ("action=serve",), "plan.json: the disk is full"),
    "its lock": (12, ("action=serve",), "lock.json: the disk is full"),
    "its state": (16, ("action=serve",), "state.json: the disk is full"),
    "a bench": (8, ("action=bench",), "plan.json: the disk is full"),
    "an export": (
        0,
        ("action=export", "export.format=systemd", "export.path={disk}/unit"),
        "unit cannot be written (No",
    ),
    "the record of a sweep": (0, ("-m", "action=plan", "kt.cpuinfer=1,2"), "sweep.json: the disk is full"),
    "hydra's part of a sweep": (4, ("-m", "action=plan", "kt.cpuinfer=1,2"), "the disk is full"),
    "merged weights": (4, ("action=merge", "lora={adapter}", "merge.path={disk}/merged"), "the disk is full"),
    "quantized weights": (4, ("action=quantize", "kt=int8", "kt.weight_path={disk}/quantized"), "the disk is full"),
}
"""KiB left, what is typed, what is told."""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every case, in one process."""
    folder = tmp_path_factory.mktemp("full")
    disk = folder / "disk"
    disk.mkdir()
    if in_small_disk(disk, "true").returncode:
        pytest.skip("this user may not mount a file system")
    write_adapter(folder / "west")
    own = ["server.device=cpu", f"model={write_checkpoint(folder / 'm')}", f"paths.runs={disk / 'runs'}"]
    places = {"disk": disk, "adapter": folder / "west"}
    asked = [[left, [*own, *(word.format(**places) for word in words)]] for left, words, _ in CASES.values()]
    done = in_small_disk(disk, sys.executable, str(HERE), str(disk), json.dumps(asked), KT_LAUNCH_CACHE=f"{disk}/cache")
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_full_disk_is_one_line(ended: dict[str, dict[str, Any]], case: str) -> None:
    found = ended[case]
    errors = [line for line in found["err"].splitlines() if line.startswith("error: ")]
    assert found["code"] == 2, found
    assert len(errors) == 1 and CASES[case][2] in errors[0], found
    assert "Traceback" not in found["err"]
    assert found["seconds"] < 5  # of the processor; two where nothing else runs
    assert found["peak_bytes"] < 300 << 20


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_that_would_be_believed(ended: dict[str, dict[str, Any]], case: str) -> None:
    """A plan without its lock, a file that was not written to its end, a folder of weights under its final name."""
    files = [Path(name) for name in ended[case]["files"]]
    assert [file for file in files if file.suffix == ".tmp" or file.name in ("unit", "state.json")] == []
    plans = {file.parent for file in files if file.name == "plan.json"}
    assert plans <= {file.parent for file in files if file.name == "lock.json"}
    assert [file for file in files if file.parts[0] in ("merged", "quantized")] == []
