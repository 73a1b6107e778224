"""action=export: a launch for systemd, Docker, compose or Kubernetes, or the Grafana dashboard; starts nothing."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from kt_launch.actions import Job
from kt_launch.actions.page import LAUNCH_KEYS, Page
from kt_launch.machine.host import user_name
from kt_model.atomic_file import write_text
from kt_model.errors import LaunchError
from kt_model.installed import PRODUCT, version_of
from kt_model.plan import HOST_MEMORY, LaunchPlan
from kt_model.units import GIB
from kt_model.user_paths import expanded

PAGE = Page(
    (
        "A launch as a systemd unit, a Dockerfile, a compose file or a Kubernetes manifest, with its resources "
        "from the plan's estimate and its secrets left to the environment; each considers it ready once it is "
        "proven. Or the Grafana dashboard for kt-launch's and SGLang's metrics.",
    ),
    (
        ("kt-launch export export.format=systemd", "to the terminal"),
        ("kt-launch export export.format=grafana", "the dashboard"),
    ),
    ("export.", *LAUNCH_KEYS),
)

MEMORY_MARGIN, MEMORY_SPARE_GIB = 1.2, 2
"""Margin over the plan's estimate for a container: a hard memory limit must not be an exact estimate."""


def run(job: Job) -> None:
    text = _dashboard(job) if job.config.export.format == "grafana" else _export(job)
    if job.config.export.path is None:
        print(text, end="")
        return
    file = expanded(job.config.export.path).absolute()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    except OSError as failure:
        problem = f"{file} cannot be written ({failure.strerror})"
        raise LaunchError("export.path", problem, "Choose a file that you can write.") from failure
    print(f"written: {file}")


def _dashboard(job: Job) -> str:
    from kt_launch.exports.grafana import write_dashboard

    job.problems.raise_if_any()
    return write_dashboard()


def _export(job: Job) -> str:
    from kt_launch.exports import read_launch, write_export
    from kt_launch.gathering.facts import prepare

    plan = prepare(job.config, job.sources, job.problems)
    launch = read_launch(
        plan,
        weights_made=Path(plan.value("kt.weight_path")).is_dir(),
        memory_gib=memory_gib(plan),
        version=version_of(PRODUCT) or "unknown",
        python=sys.executable,
        user=user_name(),
    )
    return write_export(launch, job.config.export.format)


def memory_gib(plan: LaunchPlan) -> int:
    """Memory to request for a container: the plan's estimate plus a margin."""
    needed: int = sum(plan.value("fit")[HOST_MEMORY].values())
    return math.ceil(MEMORY_MARGIN * needed / GIB) + MEMORY_SPARE_GIB
