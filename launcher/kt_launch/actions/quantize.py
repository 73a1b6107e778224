"""action=quantize: makes the folder of quantized experts that kt.method=AMXINT8_SFT and AMXINT4_SFT are served from."""

from __future__ import annotations

import os

from kt_launch.actions import Job
from kt_launch.machine.host import read_host
from kt_launch.planning.locate import absolute, locate_model
from kt_launch.planning.threads import usable_threads
from kt_model.checkpoint import read_checkpoint
from kt_model.digests import Digests
from kt_model.errors import EXIT_OK, LaunchError
from kt_model.experts import ExpertSource
from kt_model.weights.folder import FORMS, read_folder, verify_hashes
from kt_model.weights.locations import own_folder
from kt_model.weights.quantizing import quantize


def run(job: Job) -> int:
    method = job.config.kt.method
    if method not in FORMS:
        problem = f"{method} is served from the checkpoint as it is, there is nothing to quantize"
        job.problems.add_error(LaunchError("kt.method", problem, f"Type kt.method={' or kt.method='.join(FORMS)}."))
    job.problems.raise_if_any()
    base = read_checkpoint(locate_model(job.config, job.sources, os.environ).path, float8=True)
    source = ExpertSource(base)
    given = job.config.kt.weight_path
    target = absolute(given) if given else own_folder(source, method)
    made = quantize(source, method, target, job.config.kt.cpuinfer or usable_threads(read_host())[0])
    folder = read_folder(target, method, base)
    with Digests() as digests:
        verify_hashes(folder, digests.sha256)
    print(f"{'made' if made else 'there already'}: {target} ({folder.bytes / 2**20:.1f} MiB, {method})")
    return EXIT_OK
