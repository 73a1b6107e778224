"""Ways in which a running server ends, for the last test of a file that has one: nothing of it is left behind."""

from __future__ import annotations

import signal

from launching import Running, wait_gone

from kt_launch.machine.processes import command_of
from kt_launch.machine.shared_memory import shared_files, shared_files_of
from kt_launch.runs.scratch import remove_abandoned
from kt_model.contract import START


def require_end_without_main(running: Running) -> None:
    """Its main process is killed: its children go along, and the launcher tells it."""
    processes = running.server_processes()
    main = min(processes, key=lambda p: p.create_time())
    number = main.environ()[START]
    assert "sglang_loads_" in {file.name.partition(number)[0] for file in shared_files_of(number)}
    main.send_signal(signal.SIGKILL)
    assert running.process.wait(timeout=300) == 128 + signal.SIGKILL
    assert wait_gone(processes) == []
    assert shared_files_of(number) == set()


def require_end_without_detokenizer(running: Running) -> None:
    """Its detokenizer is killed: the server cannot go on, and what it had in shared memory goes with it."""
    (detokenizer,) = [each for each in running.server_processes() if "detokenizer" in command_of(each)]
    processes = running.server_processes()
    shared = shared_files(each.pid for each in processes)
    assert shared, "SGLang uses shared memory"
    detokenizer.kill()
    assert running.process.wait(timeout=300) != 0
    assert wait_gone(processes) == []
    assert [file for file in shared if file.exists()] == []


def require_end_without_launcher(running: Running) -> None:
    """Its launcher is killed. What it had in shared memory goes with the next start."""
    processes = running.server_processes()
    number = processes[0].environ()[START]
    running.process.kill()
    assert len(processes) >= 3
    assert wait_gone(processes) == []
    remove_abandoned()
    assert shared_files_of(number) == set()
