"""action=export: a launch for systemd, Docker, compose or Kubernetes, or the Grafana dashboard; starts nothing."""

from __future__ import annotations

import getpass
import math
import sys
from pathlib import Path

from kt_launch.actions import Job
from kt_launch.errors import EXIT_OK, LaunchError
from kt_launch.help import version

OVERHEAD_GIB = 8
"""Processes of Python and SGLang, buffers, a KV cache of a few thousand tokens."""


def run(job: Job) -> int:
    text = _dashboard(job) if job.config.export.format == "grafana" else _export(job)
    if job.config.export.path is None:
        print(text, end="")
        return EXIT_OK
    file = Path(job.config.export.path).expanduser().absolute()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    except OSError as failure:
        problem = f"{file} cannot be written ({failure.strerror})"
        raise LaunchError("export.path", problem, "Name a file that you may write.") from failure
    print(f"written: {file}")
    return EXIT_OK


def _dashboard(job: Job) -> str:
    from kt_launch.metrics import DASHBOARD

    job.problems.raise_if_any()
    return DASHBOARD.read_text()


def _export(job: Job) -> str:
    from kt_launch.exports import read_launch, write_export
    from kt_launch.prepare import prepare

    plan = prepare(job.config, job.sources, job.problems)
    launch = read_launch(
        plan,
        memory_gib=_memory_gib(Path(plan.value("model.path"))),
        version=version().rpartition(" ")[2].strip("()"),
        python=sys.executable,
        user=getpass.getuser(),
    )
    return write_export(launch, job.config.export.format)


def _memory_gib(checkpoint: Path) -> int:
    """A request that suffices: the weights once, and what comes on top."""
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    return math.ceil(weights / 2**30 * 1.1) + OVERHEAD_GIB
