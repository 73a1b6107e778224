"""action=bench: plans as serve does, then measures the server in a child process (kt_launch.bench).

In a sweep the result is the job's row; a single bench writes a report into the run folder.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from kt_launch.actions import Job
from kt_launch.actions.page import LAUNCH_KEYS, Data, Page
from kt_launch.bench import RECORD_FILE, REFERENCE_METHOD, REFERENCE_PLAN
from kt_launch.config.schema import Bench, Config
from kt_launch.gathering.facts import prepare
from kt_launch.machine.host import read_host
from kt_launch.running.launch import record
from kt_launch.sweeps.folder import FAILED, INTERRUPTED, Row
from kt_launch.sweeps.isolate import Ending, run_isolated
from kt_launch.sweeps.report import show_report, write_report
from kt_launch.sweeps.summary import summarize
from kt_model.errors import EXIT_INTERRUPTED, LaunchError, LaunchErrors, Problems
from kt_model.installed import versions
from kt_model.jsonfile import read_json_or_empty
from kt_model.plan import LaunchPlan
from kt_model.printable import say

PAGE = Page(
    (
        "Starts the server as serve does, drives it with SGLang's own benchmark client, and records time to the first "
        "token, time per token, throughput, peak memory, start time, and how far the answers' probabilities are from "
        "those of a BF16 server (KL, top-1 agreement). With -m each combination becomes a row, failures included, in "
        "a table and an HTML page; see [Benches and sweeps](../sweeps.md).",
    ),
    (
        ("kt-launch bench bench.concurrency=[1,4]", "one launch"),
        ("kt-launch bench -m kt.method=bf16,int8,int4 kt.prepare=true", "compare the methods"),
    ),
    (*LAUNCH_KEYS, "bench.", "sweep.", "format"),
    data=Data("one object, the row of [results.json](../sweeps.md); of a sweep, one a line"),
)
MEASURED_BY = {"concurrency", "requests", "input_tokens", "output_tokens", "warmup", "endpoint"}
"""The settings that a bench's numbers depend on."""


def run(job: Job) -> int:
    plan = prepare(job.config, job.sources, job.problems)
    _require_one_server(plan)
    _check_tokens(job.config.bench, plan)
    plan, folder = record(plan, job.config.paths.runs, job.overrides)
    _write_reference_plan(job, plan, folder)
    for warning in plan.warnings:
        say(f"warning: {warning}", file=sys.stderr)
    host = read_host()
    job.record["machine"] = {"cpu": host.cpu_model, "cores": len(host.cores), "memory_bytes": host.memory_bytes}
    job.record.update(versions=versions(), bench=job.config.bench.model_dump(include=MEASURED_BY))
    job.record.update(run_folder=str(folder), resolved={key: item.value for key, item in plan.resolved.items()})
    began = time.monotonic()
    command = [sys.executable, "-P", "-m", "kt_launch.bench.measure", str(folder), str(os.getpid())]
    ending = run_isolated(command, job.config.bench.timeout_s, quiet=job.wants_json)
    job.record.update(read_json_or_empty(folder / RECORD_FILE), seconds=round(time.monotonic() - began, 1))
    return _conclude(job, ending, folder)


def _require_one_server(plan: LaunchPlan) -> None:
    """Raise LaunchError for replicas: the router in front of them does not answer the routes that a bench reads."""
    if "server.replicas" in plan.resolved:
        problem = f"{plan.value('server.replicas')} replicas, but a bench measures one server"
        raise LaunchError("server.replicas", problem, "Leave it out, or set server.dp for copies in one server.")


def _check_tokens(bench: Bench, plan: LaunchPlan) -> None:
    """Raise LaunchError if no request of the bench could be answered; a chat template adds tokens of its own."""
    asked, limit = bench.input_tokens + bench.output_tokens, plan.value("server.context_length")
    if limit is not None and asked > limit:
        wanted = f"{bench.input_tokens} tokens and {bench.output_tokens} of the answer"
        fix = f"Set bench.input_tokens={max(limit // 2, 2)} bench.output_tokens=32, or a larger server.context_length."
        raise LaunchError("bench.input_tokens", f"{wanted}, but a request has at most {limit}", fix)


def _conclude(job: Job, ending: Ending, folder: Path) -> int:
    row = job.record
    stopped = ending.state == FAILED and ending.exit_code == EXIT_INTERRUPTED
    row.update(state=INTERRUPTED if stopped else ending.state, exit_code=ending.exit_code)
    row["error"] = row.get("error") or ending.error
    if ending.memory_ran_out:
        row["error"] = f"{row['error']}; the kernel killed a process that ran out of memory meanwhile"
    if row["error"]:
        say(f"error: {row['error']}", file=sys.stderr)
    else:
        row["summary"] = summarize(row)
    if job.wants_json:
        job.print_json({"number": job.number or 0, "overrides": job.overrides, **row})
    if job.number is None:
        rows = [Row({"number": 0, "overrides": job.overrides, **row})]
        if not job.wants_json:
            show_report(rows)
        say(f"report: {write_report(rows, folder)}", file=sys.stderr if job.wants_json else None)
    return ending.exit_code


def _write_reference_plan(job: Job, plan: LaunchPlan, folder: Path) -> None:
    """The same launch with the experts in BF16, unless they already are."""
    if job.config.bench.quality and plan.value("kt.method") != REFERENCE_METHOD:
        try:
            prepare(_in_bf16(job.config), job.sources, Problems()).write(folder / REFERENCE_PLAN)
        except (LaunchError, LaunchErrors) as failure:
            print(f"warning: bench.quality: no new BF16 reference can be computed here: {failure}", file=sys.stderr)


def _in_bf16(config: Config) -> Config:
    kt = config.kt.model_copy(update={"method": REFERENCE_METHOD, "weight_path": None})
    return config.model_copy(update={"kt": kt})
