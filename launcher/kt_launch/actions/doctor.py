"""action=doctor: runs the checks and shows what to do; exit 0 only when nothing fails."""

from __future__ import annotations

import json

from kt_launch.actions import Job
from kt_launch.commandline.terminal import print_table
from kt_launch.doctor import run_checks
from kt_model.errors import EXIT_OK

EXIT_FAILED = 1


def run(job: Job) -> int:
    job.problems.raise_if_any()
    found = list(run_checks(job.config))
    if job.config.doctor.format == "json":
        rows = [{"check": name, "status": f.status, "detail": f.detail, "fix": f.fix} for name, f in found]
        print(json.dumps(rows, indent=2))
    else:
        print_table(("check", "status", "detail", "fix"), [(name, f.status, f.detail, f.fix) for name, f in found])
    return EXIT_FAILED if any(finding.status == "fail" for _, finding in found) else EXIT_OK
