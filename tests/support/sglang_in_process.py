"""SGLang's model runner with our plugin in this very process, without a server around it: for looking into a model.

Hooks patch SGLang for good and its runtime is made once, so call it in a process of its own (`forked`).
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kt_model.gc_pause import gc_paused

ARGUMENTS = (
    "--dtype bfloat16 --device cpu --attention-backend torch_native --sampling-backend pytorch "
    "--mem-fraction-static 0.3 --max-total-tokens 512 --max-running-requests 1 --context-length 512 "
    "--kt-method AMXBF16_SFT --kt-cpuinfer 1 --kt-threadpool-count 1 --kt-num-gpu-experts 0"
)


def prepare() -> None:
    """Import SGLang and put our hooks in place; takes some seconds, forked children need it no more."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "KT_LAUNCH_PACKED_CACHE": "off"}
    with gc_paused():
        _import()


def _import() -> None:
    import kt_sglang
    from kt_sglang.without_gpu import torchvision_shim

    kt_sglang.activate()
    torchvision_shim.install_if_needed()
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from kt_sglang.hooks import require_hooks

    require_hooks()
    import sglang.benchmark.one_batch
    import sglang.srt.models.registry  # noqa: F401


def load(checkpoint: Path) -> Any:
    """The model runner, with the checkpoint loaded as a server loads it."""
    from sglang.benchmark import one_batch
    from sglang.srt.server_args import PortArgs, prepare_server_args

    paths = ["--model-path", str(checkpoint), "--kt-weight-path", str(checkpoint)]
    arguments = prepare_server_args([*paths, *ARGUMENTS.split()])
    one_batch._set_envs_and_config(arguments)
    ports = PortArgs.init_new(arguments)
    one_batch.publish(arguments, role="scheduler", ranks=one_batch.SpawnRanks(world_rank=0, gpu_id=0))
    one_batch._init_process_global_configs()
    return one_batch.load_model(arguments, ports, 0, 0)[0].torch_runner


def forked(work: Callable[[], None]) -> bool:
    """Run in a child of this process; whether it came to its end."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    try:
        work()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
