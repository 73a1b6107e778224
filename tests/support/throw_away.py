"""Environments of one test, with packages of a list below requirements/ on top of the tests' own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"


def make_throw_away(folder: Path, requirements: str) -> Path:
    """The environment's python. Skips the test where no package index can be reached."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "tests.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    python = folder / "bin" / "python"
    options = ("--quiet", "--no-compile", "--retries", "1")
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", python, "install", *options]
    done = subprocess.run([*pip, "-r", REQUIREMENTS / requirements], capture_output=True, text=True)
    if "from versions: none" in done.stderr:
        pytest.skip(f"no package index can be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return python
