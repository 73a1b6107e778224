"""Environments of one test, with packages of a list below requirements/ on top of the tests' own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"


def make_throw_away(folder: Path, requirements: str) -> Path:
    """The environment's python. Skips the test where no package index can be reached; a download that breaks off is
    begun again."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "tests.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    python = folder / "bin" / "python"
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile"]
    for retries in ("1", "5", "10"):
        words = [*pip, "--retries", retries, "-r", REQUIREMENTS / requirements]
        done = subprocess.run(words, capture_output=True, text=True)
        if "from versions: none" in done.stderr:
            pytest.skip(f"no package index can be reached: {done.stderr.strip().splitlines()[-1]}")
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr
    return python
