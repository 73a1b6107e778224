"""kt-launch as a process of its own without its start: forked from the tests' process, which has imported it already.

For what a command says and does. What a process inherits by being started, such as limits or a terminal, is for a real
one (launching.py).
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NoReturn

from kt_launch.cli import main


def call_forked(
    words: Sequence[str], cwd: Path, env: Mapping[str, str], timeout: float, anew: str = ""
) -> subprocess.CompletedProcess[str]:
    """The command to its end, as subprocess.run tells it; killed and an error where that takes longer. anew: a package
    that reads its environment when it is imported."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            for name in [name for name in sys.modules if anew and name.partition(".")[0] == anew]:
                del sys.modules[name]
            _run(words, cwd, env, out, err)
        code = _wait(child, timeout)
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(list(words), code, out.read().decode(), err.read().decode())


def _wait(child: int, timeout: float) -> int:
    with os.fdopen(os.pidfd_open(child)) as ended:
        if not select.select([ended], [], [], timeout)[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise subprocess.TimeoutExpired("kt-launch", timeout)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _let_go_of_files() -> None:
    """What the tests' process has open is closed, as by exec; but its numbers stay taken, since loggers and others that
    were made there still write to them, or close them some day, and the command's own files must not get these."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in {int(each.name) for each in Path("/proc/self/fd").iterdir()} - {0, 1, 2, nowhere}:
        os.dup2(nowhere, number, inheritable=False)


def _run(words: Sequence[str], cwd: Path, env: Mapping[str, str], out: IO[bytes], err: IO[bytes]) -> NoReturn:
    """What the interpreter does around `main`; of pytest nothing is left."""
    code = 1
    try:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        _let_go_of_files()
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, encoding="utf-8") for number in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd)
        tempfile.tempdir = None
        code = main(list(words))
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
