"""action=serve: records the plan in a run folder and starts it there; with detach=true, returns when it is ready.

In a multirun, each server is stopped once it is proven, since the next could not begin otherwise; detach=true leaves
them running.
"""

from __future__ import annotations

from kt_launch.actions import Job
from kt_launch.actions.page import LAUNCH_KEYS, Page
from kt_launch.gathering.facts import prepare
from kt_launch.running.launch import record, start

PAGE = Page(
    (
        "Resolves the plan, checks it against the files and the machine, starts SGLang in its own session, follows "
        "its log phase by phase, asks it for a real token and proves that experts and adapters take effect: each "
        "scheduler process reports which of the plugin's classes are in place and what ran through them, one token is "
        "recomputed in float32, base and adapter must give different first-token logprobs, and base and every adapter "
        "must predict a shipped text with finite, unequal logprobs, the base better than by chance. Only then does it "
        "say ready.",
        "A checkpoint of up to proof.whole_model_gib is also compared with the whole model: while the server "
        "loads, transformers runs it in float32 on the CPU, in its own process, with and without each "
        "adapter (by PEFT where it is installed and reads that adapter as it was trained), and the logprobs at "
        "720 positions of random prompts may differ only as far as bfloat16's rounding explains. The lines that begin "
        "with proof: say what was checked, what was not and why; proof.json in the run's folder has the numbers.",
        "Every run has a folder with the plan, the lock (versions, hashes, machine), logs, proof, timings and "
        "peak memory. Ctrl-C or SIGTERM stops the server and all its processes.",
        "With -m the servers run one after another: each is started, proven and stopped, and the exit code is the "
        "worst one. detach=true leaves them running instead.",
        "An adapter's folder may be that of its training run: without an adapter_config.json of its own it means its "
        "newest checkpoint-N, and the plan says which. Other files that look like weights are listed, not read.",
        "Adapters can also be loaded and unloaded while it runs: see [hot loading](../hot-loading.md).",
    ),
    (
        ("kt-launch", "the shipped demo model and its adapter"),
        ("kt-launch model=deepseek_v2_lite lora=west_all", "presets; folders below KT_LAUNCH_MODELS"),
        (
            "kt-launch model=/models/DeepSeek-V2-Lite-Chat lora=[/adapters/west,/adapters/chef]",
            "any checkpoint and adapters",
        ),
        ("kt-launch model=deepseek_v2_lite lora=none kt.method=int8 kt.prepare=true", "int8 experts"),
        ("kt-launch model=deepseek_v2_lite lora=none lora.max_rank=16", "capacity for adapters loaded later"),
        (
            "kt-launch detach=true server.restarts=3 server.metrics_port=9100",
            "in the background, with restarts and metrics",
        ),
        (
            "kt-launch -m model=deepseek_v2_lite lora=west_all kt.prepare=true kt.method=bf16,int8,int4",
            "does each method start, and does the adapter take effect in each",
        ),
    ),
    (*LAUNCH_KEYS, "detach"),
)


def run(job: Job) -> int:
    plan, folder = record(prepare(job.config, job.sources, job.problems), job.config.paths.runs, job.overrides)
    job.record["run_folder"] = str(folder)
    return start(plan, folder, job.config.detach, until_proven=job.number is not None)
