"""On a CPU a server's processes are forked where that is safe, with one thread only, and begin as if spawned."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

CODE = """
import json, multiprocessing, signal, sys, threading
from kt_sglang.without_gpu.forked import after_set_envs_and_config

def tell(pipe):
    quits = signal.getsignal(signal.SIGQUIT) is signal.SIG_DFL
    pipe.send([sys.modules["__main__"].__dict__.get("imported"), multiprocessing.get_start_method(), quits])

if __name__ == "__main__":
    imported = "once"
    signal.signal(signal.SIGQUIT, lambda *_: None)
    multiprocessing.set_start_method("spawn")
    stop = threading.Event()
    if sys.argv[1] == "threads":
        threading.Thread(target=stop.wait).start()
    after_set_envs_and_config(None, None)
    stop.set()
    method, (here, there) = multiprocessing.get_start_method(), multiprocessing.Pipe()
    if method == "fork":
        child = multiprocessing.Process(target=tell, args=[there])
        child.start()
        child.join()
        print(json.dumps([method, here.recv()]))
    else:
        print(json.dumps([method, None]))
"""


@pytest.mark.parametrize(
    ("threads", "expected"), [("alone", ["fork", ["once", "spawn", True]]), ("threads", ["spawn", None])]
)
def test_only_a_process_of_one_thread_forks(threads: str, expected: list[object]) -> None:
    done = subprocess.run([sys.executable, "-P", "-c", CODE, threads], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected
