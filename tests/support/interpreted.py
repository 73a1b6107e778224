"""Triton's kernels without a card, in its interpreter."""

from __future__ import annotations

import os
import subprocess
import sys


def interpreted(program: str, *arguments: str) -> str:
    """What `program` prints in a process of its own, which must end well: whether to interpret is decided when kernels
    are defined."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
