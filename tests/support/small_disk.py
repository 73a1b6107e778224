"""A file system that is soon full, for commands that write."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

MOUNT = 'mount -t tmpfs -o size=1500k none "$0" && exec "$@"'


def in_small_disk(disk: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run with a file system of its own at `disk`, which goes away with it."""
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNT, str(disk), *command]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env=os.environ | environment)
