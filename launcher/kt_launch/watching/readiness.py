"""Tells supervisors that a run is ready, which it is once it is proven, not when its port opens: systemd over its
socket, probes of containers by the exit code of `python -m kt_launch.watching.readiness`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys

from kt_launch.machine.folders import runs_folder
from kt_launch.runs.state import FILE, READY, read_state

PROBE = ("python", "-P", "-m", "kt_launch.watching.readiness")
"""The command of a probe, as the image of our Dockerfile has it."""


def tell_systemd() -> None:
    """READY=1 to the socket of a unit of Type=notify (sd_notify(3)); nothing outside of one, or where it is gone."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unit:
            unit.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
            unit.send(b"READY=1")


def any_ready() -> bool:
    """Whether a run below KT_LAUNCH_RUNS is ready."""
    states = (read_state(file.parent) for file in runs_folder(None).glob(f"*/{FILE}"))
    return any(state is not None and state.now == READY for state in states)


if __name__ == "__main__":
    sys.exit(not any_ready())
