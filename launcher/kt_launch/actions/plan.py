"""action=plan: shows the plan of a launch; starts nothing, imports neither torch nor sglang."""

from __future__ import annotations

from kt_launch.actions import Job
from kt_launch.actions.page import LAUNCH_KEYS, Data, Page
from kt_launch.gathering.facts import prepare

PAGE = Page(
    (
        "Shows every value of the launch with where it came from (default, preset file, command line, environment, "
        "probed, derived), how much of each memory it takes and how much is free now, the warnings, and the exact "
        "command. Starts nothing and imports neither torch nor SGLang, so it answers within half a second.",
    ),
    (
        ("kt-launch plan model=deepseek_v2_lite lora=west_all", "before the first start"),
        ("kt-launch plan --json", "for programs"),
        ("kt-launch plan -m kt.cpuinfer=1,2", "several, one after another"),
    ),
    (*LAUNCH_KEYS, "format"),
    picture=True,
    data=Data(
        "one object",
        (
            ("config", "the config with its defaults, as the keys of the schema"),
            ("resolved", "each key of the plan with its value and source"),
            ("argv", "the command of the server"),
            ("env", "the environment that it gets"),
            ("warnings", "sentences"),
        ),
    ),
)


def run(job: Job) -> None:
    plan = prepare(job.config, job.sources, job.problems)
    job.record["resolved"] = {key: item.value for key, item in plan.resolved.items()}
    if job.wants_json:
        print(plan.to_json(indent=2 if job.number is None else None))
    else:
        from kt_launch.commandline.terminal import print_plan

        print_plan(plan)
