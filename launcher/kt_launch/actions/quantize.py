"""action=quantize: makes the folder of quantized experts for kt.method=int8 or int4."""

from __future__ import annotations

import os

from kt_launch.actions import Job
from kt_launch.actions.page import Data, Page
from kt_launch.gathering.hub import fetch
from kt_launch.machine.host import read_host
from kt_launch.planning.device import check_installed
from kt_launch.planning.locate import locate_model
from kt_launch.planning.threads import usable_threads
from kt_model.checkpoint import read_checkpoint
from kt_model.digests import Digests
from kt_model.errors import LaunchError
from kt_model.experts import ExpertSource
from kt_model.methods import QUANTIZED
from kt_model.printable import say
from kt_model.user_paths import absolute
from kt_model.weights.folder import read_folder, verify_hashes
from kt_model.weights.locations import own_folder
from kt_model.weights.quantizing import quantize

PAGE = Page(
    (
        "Reads the routed experts of a checkpoint (BF16, FP16 or FP8) one layer at a time and writes "
        "them as int8 (a scale per output row) or int4 (a scale per 32 inputs) into a folder of safetensors shards "
        "with a manifest of shapes, method and SHA-256 per shard. It resumes where it was interrupted, and a folder "
        "is used only once it is complete. Each layer's error (relative L2, worst expert) is shown and recorded.",
        "Without kt.weight_path the folder is in the cache (KT_LAUNCH_CACHE), where serve looks for it; serve also "
        "finds one next to the model, named <model>-CPU-weight-INT8. A folder of that name that kt-kernel packed for "
        "its own tiles is reported and not used.",
    ),
    (
        ("kt-launch quantize model=deepseek_v2_lite kt.method=int8", "into the cache"),
        (
            "kt-launch quantize model=deepseek_v2_lite kt.method=int4 kt.weight_path=/weights/int4",
            "into your own folder",
        ),
    ),
    ("model.path", "model.folder", "paths.models", "kt.method", "kt.weight_path", "kt.cpuinfer", "format"),
    data=Data(
        "one object",
        (
            ("path", "folder of the experts"),
            ("made", "false where it was there already"),
            ("method", "their number format"),
            ("bytes", "of the weights"),
        ),
    ),
)


def run(job: Job) -> None:
    method = job.config.kt.method
    if method not in QUANTIZED:
        problem = f"{method} is served from the checkpoint as it is, there is nothing to quantize"
        job.problems.add_error(LaunchError("kt.method", problem, f"Set kt.method={' or kt.method='.join(QUANTIZED)}."))
    check_installed(read_host(), job.problems, job.config.server.device, "quantize")
    fetch(job.config, read_host, job.problems)
    job.problems.raise_if_any()
    base = read_checkpoint(locate_model(job.config, job.sources, os.environ).path, float8=True)
    source = ExpertSource(base)
    given = job.config.kt.weight_path
    target = absolute(given) if given else own_folder(source, method)
    made = quantize(source, method, target, job.config.kt.cpuinfer or usable_threads(read_host())[0])
    folder = read_folder(target, method, base)
    with Digests() as digests:
        verify_hashes(folder, digests.sha256)
    if job.wants_json:
        job.print_json({"path": str(target), "made": made, "method": method, "bytes": folder.bytes})
    else:
        say(f"{'made' if made else 'there already'}: {target} ({folder.bytes / 2**20:.1f} MiB, {method})")
