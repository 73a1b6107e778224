"""Tells supervisors that a run is ready, which means proven, not merely listening: systemd over its socket, container
probes over HTTP, or by the exit code of `python -m kt_launch.watching.readiness` if they run a command. The server's
own answers are the plugin's (kt_sglang/edge/ready.py).
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from http import HTTPStatus

from kt_launch.machine.folders import runs_folder
from kt_launch.runs.state import READY, read_state
from kt_model.contract import STATE_FILE

PROBE = ("python", "-P", "-m", "kt_launch.watching.readiness")
"""The probe command, as in the image of our Dockerfile."""
READY_PATH, ROUTER_READY_PATH = "/ready", "/readiness"
"""Of a server, and of SGLang's router, which answers once all its servers are proven."""
HEALTH_PATH = "/health"
"""Of both, and of a host that is a part of a server, which has no other route; on a server this runs a real
generation."""
ANSWER_S = 4.0


def tell_systemd() -> None:
    """Send READY=1 to the socket of a Type=notify unit (sd_notify(3)); does nothing outside of one, or if it is
    gone."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unit:
            unit.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
            unit.send(b"READY=1")


def any_ready() -> bool:
    """Whether a run below KT_LAUNCH_RUNS is ready, and its server confirms it over HTTP."""
    states = (read_state(file.parent) for file in runs_folder(None).glob(f"*/{STATE_FILE}"))
    return any(state is not None and state.now == READY and says_ready(state.url) for state in states)


def says_ready(url: str) -> bool:
    """Whether the server at this address answers that it is ready; uses no proxy and no key."""
    return any(_status(url, path) == HTTPStatus.OK for path in (READY_PATH, ROUTER_READY_PATH))


def _status(url: str, path: str) -> int:
    from http.client import HTTPConnection, HTTPException
    from urllib.parse import urlsplit

    where = urlsplit(url)
    connection = HTTPConnection(where.hostname or "", where.port, timeout=ANSWER_S)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, HTTPException):
        return 0
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(not any_ready())
