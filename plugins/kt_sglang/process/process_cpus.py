"""Which CPUs this scheduler process runs on, if the host has several processes: its expert threads inherit them, and
memory that they first touch is on their NUMA nodes.
"""

from __future__ import annotations

import os
from typing import Any

from kt_model.contract import PROCESS_CPUS
from kt_model.cpulist import parse_cpu_list


def after_configure_scheduler_process(result: Any, server_args: Any, gpu_id: int, *_: Any, **__: Any) -> Any:
    """AFTER hook of `scheduler.configure_scheduler_process`, which runs before the process has further threads. gpu_id:
    number of its device; on a CPU, the number of the process."""
    if shares := os.environ.get(PROCESS_CPUS):
        number = (gpu_id - server_args.base_gpu_id) // server_args.gpu_id_step
        os.sched_setaffinity(0, parse_cpu_list(shares.split("|")[number]))
    return result
