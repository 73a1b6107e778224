"""The number of this host among several, and where they meet, as a batch system or Kubernetes sets it in the
environment.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

MEETING_PORT = 29500
NUMBERS = ("LWS_WORKER_INDEX", "SLURM_NODEID")
"""Kubernetes' LeaderWorkerSet, Slurm."""
LEADER, NODES = "LWS_LEADER_ADDRESS", "SLURM_JOB_NODELIST"


@dataclass(frozen=True)
class HostPlace:
    """This host among others. number: from 0; meeting: host:port of host 0. Each None if the environment does not
    say."""

    number: int | None = None
    meeting: str | None = None
    source: str = ""


def read_place(environ: Mapping[str, str]) -> HostPlace:
    """From the environment; empty outside of an allocation."""
    variable = next((name for name in NUMBERS if environ.get(name, "").isdecimal()), None)
    if variable is None:
        return HostPlace()
    leader = environ.get(LEADER) if variable == NUMBERS[0] else first_of(environ.get(NODES, ""))
    meeting = f"{leader}:{MEETING_PORT}" if leader else None
    return HostPlace(int(environ[variable]), meeting, f"environment: {variable}")


def first_of(nodes: str) -> str | None:
    """The first host of Slurm's compact form, such as gpu[01-04,07],cpu7 (scontrol show hostnames prints them all)."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    return "".join(filter(None, match.groups())) if match else None
