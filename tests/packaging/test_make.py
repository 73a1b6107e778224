"""`make install` says that there is no compiler before it downloads anything."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false"], ids=["missing", "too old"])
def test_a_missing_compiler_is_named_first(compiler: str, tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    made = subprocess.run(
        ["make", "install", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT,
        env={**kept, "CXX": compiler},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 2 and made.stdout == ""
    assert made.stderr.startswith("kt-launch needs a C++20 compiler, such as g++ 11 or newer; CXX=… names one")
    assert not (tmp_path / "venv").exists()
