"""Commands on a disk that has so many KiB left, in this one process: `python on_full_disk.py DISK CASES`, where CASES
is JSON: [[KiB, [words]], …]. Prints a JSON list of what each did. To be run by small_disk.in_small_disk.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from kt_launch.cli import main

FILLER = "filler"


def fill(disk: Path, left_kib: int) -> None:
    """Nothing on it but a file that takes all but so much."""
    for entry in disk.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    (disk / FILLER).write_bytes(bytes(max(free - left_kib * 1024, 0)))


def run(disk: Path, left_kib: int, words: list[str]) -> dict[str, Any]:
    fill(disk, left_kib)
    out, err = io.StringIO(), io.StringIO()
    began = time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    files = sorted(str(file.relative_to(disk)) for file in disk.rglob("*") if file.is_file() and file.name != FILLER)
    seconds = time.process_time() - began
    # of this program alone: ru_maxrss also knows the process that it was forked from
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
    return {"code": code, "err": err.getvalue(), "files": files, "seconds": seconds, "peak_bytes": peak}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    print(json.dumps([run(place, left, words) for left, words in json.loads(sys.argv[2])]))
