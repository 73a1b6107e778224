"""What a shell or a container allows too little of (ulimit, pids of a cgroup), and outputs that nobody reads: told in
one line, before anything is started. The limits here are real ones, of a child process.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from machines import Machine

from kt_launch.doctor.machine import describe_limits
from kt_launch.machine.limits import Limits, read_limits

GIB = 1 << 30
LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units
Max data size             {data}               unlimited            bytes
Max processes             {processes}          {processes}          processes
Max open files            {soft}               {hard}               files
Max address space         {addresses}          unlimited            bytes
"""
NONE = {"data": "unlimited", "processes": "unlimited", "soft": "unlimited", "hard": "unlimited"}
NONE["addresses"] = "unlimited"
UNDER = "import os, resource, sys; resource.setrlimit({limit}, ({value}, {value})); os.execv(sys.argv[1], sys.argv[1:])"
PLAN = ("action=plan", "server.device=cpu")


def machine(root: Path, limits: dict[str, str | int] | None = None, files: dict[str, str] | None = None) -> Path:
    """A machine with such limits; the user is no. 1000."""
    tree = {
        "proc/self/limits": LIMITS.format(**{**NONE, **(limits or {})}),
        "proc/self/status": "Name:\tx\nUid:\t1000\t1000\t1000\t1000\nCpus_allowed_list:\t0\n",
        "proc/7/status": "Uid:\t1000\t1000\t1000\t1000\nThreads:\t30\n",
        "proc/8/status": "Uid:\t1000\t1000\t1000\t1000\nThreads:\t12\n",
        "proc/9/status": "Uid:\t0\t0\t0\t0\nThreads:\t99\n",
    }
    return Machine(files=tree | (files or {}), cgroup="0::/box/inner\n").write(root)


def test_no_limits_are_none(tmp_path: Path) -> None:
    assert read_limits(machine(tmp_path)) == Limits()
    assert describe_limits(Limits()).status == "pass"


@pytest.mark.parametrize(
    ("limits", "found"),
    [
        ({"addresses": 4 * GIB, "data": 3 * GIB}, Limits(address_space_bytes=3 * GIB)),
        ({"soft": 1024, "hard": 1048576}, Limits(open_files=65535)),
        ({"soft": 1024, "hard": "unlimited"}, Limits(open_files=65535)),
        ({"soft": 1024, "hard": 4096}, Limits(open_files=1024)),
        ({"soft": 200000, "hard": 200000}, Limits(open_files=200000)),
        ({"processes": 100}, Limits(threads_left=58)),
        ({"processes": 40}, Limits(threads_left=0)),
        ({"processes": 60000}, Limits()),
    ],
)
def test_limits_of_a_shell(tmp_path: Path, limits: dict[str, str | int], found: Limits) -> None:
    assert read_limits(machine(tmp_path, limits)) == found


def test_a_containers_limit_of_pids_holds_for_root_too(tmp_path: Path) -> None:
    pids = {"sys/fs/cgroup/box/pids.max": "64\n", "sys/fs/cgroup/box/pids.current": "20\n"}
    root = {"proc/self/status": "Uid:\t0\t0\t0\t0\nCpus_allowed_list:\t0\n"}
    assert read_limits(machine(tmp_path, {"processes": 10}, pids | root)) == Limits(threads_left=44)


@pytest.mark.parametrize(
    ("limits", "fix"),
    [
        (Limits(open_files=1024), "ulimit -n"),
        (Limits(threads_left=100), "ulimit -u"),
        (Limits(address_space_bytes=GIB), "ulimit -v"),
    ],
)
def test_the_doctor_warns_of_each(limits: Limits, fix: str) -> None:
    found = describe_limits(limits)
    assert found.status == "warn" and fix in found.fix


def under(limit: str, value: int, *words: str) -> subprocess.CompletedProcess[str]:
    """kt-launch with such a limit of its own."""
    code = UNDER.format(limit=f"resource.{limit}", value=value)
    command = [sys.executable, "-c", code, sys.executable, "-P", "-m", "kt_launch.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("limit", "value", "told"),
    [
        ("RLIMIT_NOFILE", 60, "error: server.max_running_requests: a process may have 60 files open"),
        ("RLIMIT_AS", 3 * GIB // 2, "error: server.fit: a process may have 1.5 GiB of addresses"),
        ("RLIMIT_AS", GIB // 8, "error: ulimit -v: 128 MiB of addresses are too few"),
    ],
)
def test_real_limits_are_told_before_the_start(limit: str, value: int, told: str) -> None:
    done = under(limit, value, *PLAN)
    assert done.returncode == 2
    assert done.stderr.startswith(told) and done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def another_user() -> list[str]:
    """The beginning of a command that is run as a user whose processes the kernel limits, which root's are not; nobody
    else works as that user."""
    if os.geteuid() != 0:
        return []
    rights = "-all,+dac_override,+dac_read_search"  # to read the interpreter wherever it lies
    words = ["--reuid=54321", "--regid=54321", "--clear-groups", f"--inh-caps={rights}", f"--ambient-caps={rights}"]
    command = [shutil.which("setpriv") or "setpriv", *words]
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as failure:
        pytest.skip(f"root cannot become another user here: {failure}")
    return command


@pytest.mark.parametrize(("most", "action"), [(1, "serve"), (1, "stop"), (3, "plan"), (20, "serve")])
def test_too_few_processes_of_a_user_are_told_before_the_start(another_user: list[str], most: int, action: str) -> None:
    """Also where not even numpy may start its threads."""
    with tempfile.TemporaryDirectory(dir="/tmp") as home:
        Path(home).chmod(0o777)
        own = {"HOME": home, "TMPDIR": home, "KT_LAUNCH_RUNS": f"{home}/runs", "KT_LAUNCH_CACHE": f"{home}/cache"}
        code = UNDER.format(limit="resource.RLIMIT_NPROC", value=most)
        words = [action] if action == "stop" else [action, "server.device=cpu"]
        command = [sys.executable, "-P", "-m", "kt_launch.cli", *words]
        done = subprocess.run(
            [*another_user, sys.executable, "-c", code, *command],
            env={**os.environ, **own},
            cwd=home,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not Path(home, "runs").exists(), "nothing was begun"
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    told = r"error: kt\.cpuinfer: \d+ more processes and threads may be started, and the server needs \d+\. Raise .*\n"
    assert re.fullmatch(told if action != "stop" else r"error: run: no runs in .*\n", done.stderr), done.stderr


def test_a_real_limit_of_threads_is_counted(tmp_path: Path) -> None:
    """Of a user other than root, whom the kernel does not limit; another user may not read this environment, so the
    child becomes one when it has imported what it needs."""
    code = (
        "import os, pwd, resource, threading\n"
        "from kt_launch.machine.limits import read_limits\n"
        "os.geteuid() or os.setresuid(*[pwd.getpwnam('nobody').pw_uid] * 3)\n"
        "resource.setrlimit(resource.RLIMIT_NPROC, (1000, 1000))\n"
        "before = read_limits().threads_left\n"
        "over = threading.Event()\n"
        "for _ in range(20): threading.Thread(target=over.wait).start()\n"
        "print(before, before - read_limits().threads_left)\n"
        "over.set()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    left, taken = map(int, done.stdout.split())
    assert 0 <= left < 1000
    assert taken == 20 or os.geteuid() != 0  # others may work as this user meanwhile


@pytest.mark.parametrize("words", [PLAN, ("action=config",), ("--help",), ("--completion", "bash")], ids=" ".join)
def test_an_output_on_a_full_disk_is_one_line_and_exit_code_2(words: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "kt_launch.cli", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
        )
    assert (done.returncode, done.stderr) == (
        2,
        "error: standard output: the disk is full. Free some space and run it again.\n",
    )


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_outputs_that_are_closed_are_written_to_nowhere(closed: str) -> None:
    command = f'exec "$0" -P -m kt_launch.cli "$@" {closed}'
    done = subprocess.run(["bash", "-c", command, sys.executable, *PLAN], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("kt_sglang.server" in done.stdout) == ("1>" not in closed)


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_the_exit_code_of_a_mistake_stands_where_nobody_reads_it(unbuffered: str) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-P", "-m", "kt_launch.cli", "no.such.key=1"]
        env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        assert subprocess.run(command, stderr=full, stdout=full, timeout=300, env=env).returncode == 2
