"""A Slurm cluster of this one machine, in a folder: controller and a daemon for each node, which all are this machine,
from Debian's slurm-wlm, no accounting, no munge, ended afterwards. Installs nothing."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launching import LONG_S

from kt_launch.machine.ports import probe_port

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "sinfo")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
SlurmctldPort={controller_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={spool}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
{nodes}
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """What of Slurm is not installed."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [name for name in PROGRAMS if not shutil.which(name, path=path)]


@contextlib.contextmanager
def cluster(folder: Path, names: Sequence[str] = ("node0",)) -> Iterator[dict[str, str]]:
    """A running cluster of nodes with these names; the environment in which sbatch reaches it."""
    (folder / "state").mkdir(parents=True)
    file = folder / "slurm.conf"
    host, user, port = socket.gethostname().partition(".")[0], getpass.getuser(), probe_port("127.0.0.1", 0).number
    places = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN"
    nodes = "\n".join(f"NodeName={name} Port={probe_port('127.0.0.1', 0).number} {places}" for name in names)
    spool = tempfile.mkdtemp(prefix="slurm-")  # a short path: sockets lie there
    known = {"folder": folder, "spool": spool, "host": host, "user": user, "controller_port": port}
    file.write_text(CONFIGURATION.format(**known, nodes=nodes))
    env = {"SLURM_CONF": str(file), "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    with contextlib.ExitStack() as daemons:
        daemons.callback(shutil.rmtree, spool, ignore_errors=True)
        daemons.enter_context(_daemon("slurmctld", env, folder))
        for name in names:
            daemons.enter_context(_daemon("slurmd", env, folder, "-N", name))
        _wait_idle(env, folder)
        yield env


@contextlib.contextmanager
def _daemon(program: str, env: dict[str, str], folder: Path, *words: str) -> Iterator[None]:
    executable = shutil.which(program, path=env["PATH"])
    assert executable
    with (folder / f"{'-'.join([program, *words])}.out").open("wb") as out:
        process = subprocess.Popen([executable, "-D", *words], env={**os.environ, **env}, stdout=out, stderr=out)
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=300)


def _wait_idle(env: dict[str, str], folder: Path) -> None:
    deadline = time.monotonic() + LONG_S
    while True:
        said = subprocess.run(["sinfo", "-h", "-o", "%T"], env={**os.environ, **env}, capture_output=True, text=True)
        if said.stdout.split() == ["idle"]:
            return
        logs = "".join(log.read_text()[-2000:] for log in folder.glob("*.log"))
        assert time.monotonic() < deadline, f"the cluster does not start: {said.stdout}{said.stderr}\n{logs}"
        time.sleep(0.5)
