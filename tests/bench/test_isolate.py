"""One job in a process of its own: whatever it does, it ends as a row, and nothing of it is left. All of it is real."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launching import ended_with_the_test, wait_until

from kt_launch.sweeps.isolate import run_isolated
from kt_model.errors import EXIT_TOO_LONG

ORPHAN = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(sys.argv[1], "w").write(str(child.pid))
"""


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


@pytest.mark.parametrize(
    ("code", "state", "exit_code", "said"),
    [
        ("pass", "ok", 0, None),
        ("import sys; sys.exit(7)", "failed", 7, "exit 7"),
        ("raise RuntimeError", "failed", 1, "exit 1"),
        ("import os; os._exit(3)", "failed", 3, "exit 3"),
        ("import os; os.kill(os.getpid(), 9)", "crashed", 137, "killed by SIGKILL"),
        ("import os; os.abort()", "crashed", 134, "killed by SIGABRT"),
    ],
)
def test_every_ending_is_told_apart(code: str, state: str, exit_code: int, said: str | None) -> None:
    ending = run_isolated(python(code), timeout_s=300)
    assert (ending.state, ending.exit_code, ending.error) == (state, exit_code, said)


def test_a_job_that_takes_too_long_is_ended() -> None:
    began = time.monotonic()
    ending = run_isolated(python("import time; time.sleep(6000)"), timeout_s=1)
    assert (ending.state, ending.exit_code) == ("timeout", EXIT_TOO_LONG)
    assert ending.error == "not done after 1 s (bench.timeout_s)"
    assert time.monotonic() - began < 300


@pytest.mark.parametrize("end", ["", "import os; os.kill(os.getpid(), 9)", "import time; time.sleep(600)"])
def test_what_a_job_leaves_behind_is_ended_too(tmp_path: Path, end: str) -> None:
    note = tmp_path / "pid"
    for timeout_s in (3, 12, 48) if "sleep" in end else (300,):  # a busy machine takes longer to come so far
        ending = run_isolated(python(ORPHAN + end, str(note)), timeout_s, left_s=0.5)
        if note.exists() and note.read_text():
            break
    assert ending.state == {"": "ok", "import os; os.kill(os.getpid(), 9)": "crashed"}.get(end, "timeout")
    assert not psutil.pid_exists(int(note.read_text()))


def test_processes_of_others_are_left_alone(tmp_path: Path) -> None:
    other = subprocess.Popen(python("import time; time.sleep(600)"))
    try:
        assert run_isolated(python("pass"), timeout_s=300).state == "ok"
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_ctrl_c_ends_the_job_first(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = f"""
import sys
from kt_launch.sweeps.isolate import run_isolated
try:
    run_isolated([sys.executable, "-c", {ORPHAN + "import time; time.sleep(600)"!r}, {str(note)!r}], 600, 0.5)
except KeyboardInterrupt:
    sys.exit(130)
"""
    with ended_with_the_test(subprocess.Popen(python(code))) as driver:
        wait_until(lambda: note.exists() and note.read_text())
        driver.send_signal(signal.SIGINT)
        assert driver.wait(timeout=300) == 130
    assert not psutil.pid_exists(int(note.read_text()))
