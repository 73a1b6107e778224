"""`python -m kt_sglang.server PLAN.json`: the main module of every SGLang server that kt-launch starts.

On a GPU, SGLang spawns its scheduler and detokenizer, and a spawned child imports the parent's main module again, so
the top of this file runs in all of them, before SGLang is imported. On a CPU they are forked (without_gpu/forked.py).
The arguments are either the path of a written plan, or SGLang's own arguments (the command that `kt-launch plan`
prints).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import kt_sglang
from kt_model.gc_pause import gc_paused
from kt_sglang import model_classes
from kt_sglang.process import secrets, shared_names, start_progress
from kt_sglang.without_gpu import primitive_cache, torchvision_shim

if __name__ == "__main__":
    start_progress.IMPORTS.start()
kt_sglang.activate()
secrets.hide_in_output()
shared_names.name_semaphores()
model_classes.name_package()
primitive_cache.bound()
with gc_paused():
    torchvision_shim.install_if_needed()


def sglang_arguments(arguments: list[str]) -> list[str]:
    """SGLang's own arguments: read from the plan when `arguments` is one path, else `arguments` as they are."""
    if len(arguments) == 1 and not arguments[0].startswith("-"):
        from kt_model.plan import SERVER_COMMAND, LaunchPlan

        return list(LaunchPlan.read(Path(arguments[0])).argv[1 + len(SERVER_COMMAND) :])
    return arguments


def follow_launcher() -> None:
    """End with the launcher, even if it was killed; a server started by hand has none.

    By SIGKILL, which SGLang's other processes then get too: on SIGTERM it would wait for requests that nobody
    supervises, and a hung one would not end. The next start removes its shared memory.
    """
    from kt_model.contract import LAUNCHER
    from kt_model.parent_death import die_with_parent

    if launcher := os.environ.get(LAUNCHER):
        die_with_parent(int(launcher), signal.SIGKILL)


def main() -> None:
    """Load the plugins, require that ours are in place, and run SGLang's server until it ends."""
    follow_launcher()
    with gc_paused():
        from sglang.launch_server import run_server
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import prepare_server_args
        from sglang.srt.utils import kill_process_tree

        from kt_sglang import edge
        from kt_sglang.hooks import require_hooks

        load_plugins()
        require_hooks()
    start_progress.IMPORTS.end()
    server_args = prepare_server_args(secrets.read_arguments(sglang_arguments(sys.argv[1:])))
    edge.install(server_args)
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
