"""Importing the package: what interrupts it is told as what it is."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from subprocess import PIPE

STARTS = 80
APART_S = 50e-6
"""The extension is set up within the four milliseconds that these interrupts are spread over."""


def test_ctrl_c_while_the_extension_is_set_up_is_ctrl_c() -> None:
    """pybind11 makes an ImportError of it. Some of these interrupts come in that moment."""
    code = "print('now', flush=True); import kt_kernels; import time; time.sleep(60)"
    told = []
    for number in range(STARTS):
        process = subprocess.Popen([sys.executable, "-P", "-c", code], stdout=PIPE, stderr=PIPE, text=True)
        assert process.stdout and process.stdout.readline() == "now\n"
        time.sleep(number * APART_S)
        process.send_signal(signal.SIGINT)
        told.append(process.communicate(timeout=300)[1].splitlines()[-1])
    assert [line for line in told if not line.startswith("KeyboardInterrupt")] == []
