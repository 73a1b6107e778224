"""action=plan: shows the plan of a launch; starts nothing, imports neither torch nor sglang."""

from __future__ import annotations

from kt_launch.actions import Job
from kt_launch.planning.facts import prepare
from kt_model.errors import EXIT_OK


def run(job: Job) -> int:
    plan = prepare(job.config, job.sources, job.problems)
    job.record["resolved"] = {key: item.value for key, item in plan.resolved.items()}
    if job.config.plan.format == "json":
        print(plan.to_json(indent=2 if job.number is None else None))
    else:
        from kt_launch.commandline.terminal import print_plan

        print_plan(plan)
    return EXIT_OK
