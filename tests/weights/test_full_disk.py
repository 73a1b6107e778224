"""A disk that gets full in the middle: a file system of a few megabytes, where this user may mount one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from small_disk import in_small_disk
from weight_files import KT_LAUNCH, write_checkpoint


def test_a_full_disk_is_named_and_what_was_done_is_kept(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if in_small_disk(disk, "true").returncode:
        pytest.skip("this user may not mount a file system")
    checkpoint = write_checkpoint(tmp_path / "m", num_hidden_layers=20, moe_intermediate_size=256)
    words = ["action=quantize", "model=auto", f"model.path={checkpoint}", "kt=int8", f"kt.weight_path={disk / 'q'}"]
    show = 'PATH="$PATH" "$0" "$@"; echo "code $?"; ls -a "$1"/.. >/dev/null; ls ' + f"'{disk}' '{disk / 'q.partial'}'"
    done = in_small_disk(disk, "sh", "-c", show, str(KT_LAUNCH), *words)
    assert "code 2" in done.stdout, done.stderr
    assert "the disk is full. Free some space and run it again: it goes on where it stopped." in done.stderr
    assert "Traceback" not in done.stderr
    kept = [line for line in done.stdout.splitlines() if line.startswith("layer-")]
    assert 1 <= len(kept) < 19
    assert not [line for line in done.stdout.splitlines() if line.endswith(".tmp")]
    assert "q\n" not in done.stdout


def test_a_file_that_may_not_grow_is_named_too(tmp_path: Path) -> None:
    """The same path without a mount: the process may write no more than 64 KiB to a file."""
    checkpoint = write_checkpoint(tmp_path / "m")
    code = (
        "import resource, signal, sys\n"
        "from kt_launch.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = ["action=quantize", "model=auto", f"model.path={checkpoint}", "kt=int8", f"kt.weight_path={tmp_path / 'q'}"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "layer-00001.safetensors: cannot be written (File too large)." in done.stderr
    assert not (tmp_path / "q").exists()
    assert not list((tmp_path / "q.partial").glob("layer-*"))
