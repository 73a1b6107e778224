"""Stock SGLang's server, for the comparison in launch_times.py: SGLang's own arguments, nothing of kt-launch.

A machine without a GPU needs the shims of kt_sglang.without_gpu even for stock SGLang; those stay, our seams go,
and so does what only makes a start shorter. As
kt_sglang.server does, this stands at the top of the module, so that spawned children do the same.
"""

import os
import sys

import kt_sglang
from kt_sglang import hooks, without_gpu
from kt_sglang.without_gpu import torchvision_shim

hooks.SEAMS = ()
without_gpu.SEAMS = tuple(seam for seam in without_gpu.SEAMS if "forked" not in seam.hook)
kt_sglang.activate()
torchvision_shim.install_if_needed()

if __name__ == "__main__":
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    try:
        run_server(prepare_server_args(sys.argv[1:]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
