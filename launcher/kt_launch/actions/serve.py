"""action=serve: records the plan in a run folder and starts it there; with detach=true, returns when it is ready.

Of several (-m) each is ended when it is proven, since the next would never begin; detach=true leaves them running.
"""

from __future__ import annotations

from kt_launch.actions import Job
from kt_launch.planning.facts import prepare
from kt_launch.running.launch import record, start


def run(job: Job) -> int:
    plan, folder = record(prepare(job.config, job.sources, job.problems), job.config.paths.runs, job.overrides)
    job.record["run_folder"] = str(folder)
    return start(plan, folder, job.config.detach, until_proven=job.number is not None)
