"""action=doctor: runs the checks and shows what to do; exit 0 only when nothing fails."""

from __future__ import annotations

from kt_launch.actions import Job
from kt_launch.actions.page import Data, Page
from kt_launch.commandline.terminal import activity, print_table
from kt_launch.doctor import run_checks
from kt_model.errors import EXIT_OK

PAGE = Page(
    (
        "Checks Python, torch, SGLang and every part of it that the plugin hooks into (by signature, not by version), "
        "the wheel's instruction sets against the CPU, one forward pass of each method against float64 on this machine"
        ", the AMX permission, huge pages, memory bandwidth, GPU, ports, disk and permissions. Each finding "
        "is pass, warn or fail, with what to do. Exit code 0 only when nothing fails. Ports and folders are those "
        "of the config: typed ones, or the defaults.",
    ),
    (("kt-launch doctor", "a table"), ("kt-launch doctor --json", "for programs")),
    ("format", "server.host", "server.port", "server.metrics_port", "server.playground_port", "paths.runs"),
    picture=True,
    data=Data(
        "a list with an object for each check",
        (
            ("check", "its name"),
            ("status", "pass, warn or fail"),
            ("detail", "what was found"),
            ("fix", "what to do, or nothing"),
        ),
    ),
)

EXIT_FAILED = 1


def run(job: Job) -> int:
    job.problems.raise_if_any()
    with activity() as show:
        found = list(run_checks(job.config, lambda name: show(f"checking: {name}")))
    if job.wants_json:
        job.print_json([{"check": name, "status": f.status, "detail": f.detail, "fix": f.fix} for name, f in found])
    else:
        print_table(("check", "status", "detail", "fix"), [(name, f.status, f.detail, f.fix) for name, f in found])
    return EXIT_FAILED if any(finding.status == "fail" for _, finding in found) else EXIT_OK
