"""Known crashes are told by their signature, unknown ones by the exception of the process that failed first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kt_launch.config.schema import read_fields
from kt_launch.machine.oom import MemoryKills
from kt_launch.proving import proof
from kt_launch.watching.diagnosis import (
    SIGNALS,
    SIGNATURES,
    Crashed,
    Signature,
    aside_of,
    diagnose,
    first_failure,
    troubleshooting_page,
)
from kt_model.errors import ProofFailed

NAMES = [signature.name for signature in SIGNATURES]
NOISE = """\
[2026-11-23 08:59:29] Ignore import error when loading sglang.srt.models.midashenglm: No module named 'torchaudio'
[2026-11-23 08:59:30] Load weight begin. avail mem=19.61 GB
[2026-11-23 08:59:31] OpenAI Responses API (/v1/responses) disabled: OpenAIServingResponses init failed \
(ModuleNotFoundError: No module named 'openai_harmony')
"""
SCHEDULER = """\
[2026-11-23 09:10:01] Scheduler hit an exception: Traceback (most recent call last):
  File "/venv/sglang/srt/managers/scheduler.py", line 6340, in run_scheduler_process
    scheduler = Scheduler(
                ^^^^^^^^^^
  File "/venv/sglang/srt/model_loader/loader.py", line 412, in load_model
    raise KeyError(name)
KeyError: 'model.layers.1.mlp.experts.7.up_proj.weight'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "/venv/sglang/srt/model_loader/loader.py", line 418, in load_model
    raise ValueError(text) from None
ValueError: layer 1: expert 7 has no up_proj

[2026-11-23 09:10:01] Received sigquit from a child process. It usually means the child failed.
Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
  File "/venv/sglang/srt/entrypoints/engine.py", line 2031, in _wait_for_scheduler_ready
    raise RuntimeError(
RuntimeError: Initialization failed. Please see the error messages above.
[2026-11-23 09:10:02] kill_process_tree called: parent_pid=1, include_parent=True, pid=1
"""


@pytest.mark.parametrize("signature", SIGNATURES, ids=NAMES)
def test_each_signature_is_found_in_its_own_log(signature: Signature) -> None:
    found = diagnose(f"{NOISE}[2026-11-23 08:59:32] {signature.example}\n")
    assert found.signature is signature
    assert found.lines[-1].startswith(signature.example[:100])
    assert signature.cause in found.cause


def test_nothing_is_found_in_the_log_of_a_good_start() -> None:
    assert diagnose(NOISE).signature is None
    assert diagnose(NOISE).cause == ""


def test_names_are_unique_and_keys_exist() -> None:
    keys = {name for name, _ in read_fields()} | {"server"}
    assert len(set(NAMES)) == len(NAMES)
    assert [row.key for row in SIGNATURES if row.key not in keys] == []


def test_the_scheduler_is_quoted_not_the_processes_that_noticed() -> None:
    assert first_failure(SCHEDULER) == "ValueError: layer 1: expert 7 has no up_proj"
    assert diagnose(NOISE + SCHEDULER, exit_code=-9).cause == "ValueError: layer 1: expert 7 has no up_proj"


def test_a_traceback_without_a_name_is_better_than_nothing() -> None:
    log = 'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n    f()\nOSError: no such host\n'
    assert first_failure(log) == "OSError: no such host"
    assert first_failure("server.py: error: argument of mine\nbye\n") == "server.py: error: argument of mine"
    assert first_failure("all is well\n") == ""


@pytest.mark.parametrize(("code", "title"), [(-4, "Illegal instruction"), (-9, "Killed"), (-11, "Segmentation fault")])
def test_a_bare_signal_of_the_main_process(code: int, title: str) -> None:
    found = diagnose(NOISE, exit_code=code)
    assert found.signature in SIGNALS
    assert found.signature is not None and found.signature.title == title


STRANGER = '[2026-11-23 09:00:00] INFO:     10.0.0.7:4821 - "GET /{} HTTP/1.1" 404 Not Found\n'
HANDLED = """\
[2026-11-23 09:00:00] Exception in ASGI application
Traceback (most recent call last):
  File "/venv/starlette/routing.py", line 78, in app
    raise error
RuntimeError: Base weights not set
[2026-11-23 09:00:01] Decode batch, #running-req: 1
"""
DIED = "[2026-11-23 09:10:01] Subprocess scheduler_0 (pid=10703) crashed with exit code -9. Triggering SIGQUIT.\n"


@pytest.mark.parametrize("was_ready", [False, True])
def test_what_a_request_names_is_no_cause(was_ready: bool) -> None:
    log = NOISE + "".join(STRANGER.format(row.example.replace(" ", "%20")) for row in SIGNATURES)
    log += STRANGER.format("torch.OutOfMemoryError:") + STRANGER.format("Scheduler%20hit%20an%20exception:%20Traceback")
    assert diagnose(log, was_ready=was_ready).signature is None
    assert diagnose(log + DIED, -9, was_ready=was_ready).signature.name == "killed"  # type: ignore[union-attr]


def test_an_error_that_was_handled_is_not_what_a_server_died_of() -> None:
    found = diagnose(NOISE + HANDLED + DIED, -9, was_ready=True)
    assert found.signature is not None and found.signature.name == "killed"
    assert diagnose(NOISE + HANDLED, 1, was_ready=True).cause == ""


def test_a_server_that_had_been_ready_died_of_its_last_fatal_traceback() -> None:
    log = NOISE + HANDLED + SCHEDULER
    assert diagnose(log, -9, was_ready=True).cause == "ValueError: layer 1: expert 7 has no up_proj"
    memory = SCHEDULER.replace(
        "ValueError: layer 1: expert 7 has no up_proj", "torch.OutOfMemoryError: CUDA out of memory"
    )
    assert diagnose(memory).configuration
    assert not diagnose(memory, was_ready=True).configuration


def test_signals_that_sglang_sent_itself_are_no_cause() -> None:
    assert diagnose(f"{NOISE}[2026-11-23 09:10:02] kill_process_tree called: pid=1\n", exit_code=-9).signature is None


def test_the_kernels_count_of_memory_kills_goes_before_a_bare_signal(tmp_path: Path) -> None:
    events = tmp_path / "sys/fs/cgroup/box/memory.events"
    events.parent.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/box\n")
    events.write_text("low 0\noom 1\noom_kill 1\n")
    kills = MemoryKills(tmp_path)
    assert kills.since() == ""
    events.write_text("low 0\noom 3\noom_kill 3\n")
    assert kills.since() == "oom_kill counted 2 in the cgroup's memory.events"
    found = diagnose(NOISE, -9, kills.since())
    assert found.signature is not None and found.signature.name == "out-of-memory-ended-by-the-kernel"
    assert not found.configuration


def test_a_kill_that_the_kernel_does_not_count_was_somebodys(tmp_path: Path) -> None:
    vmstat = tmp_path / "proc/vmstat"
    vmstat.parent.mkdir()
    assert not MemoryKills(tmp_path).excluded, "nothing is counted"
    vmstat.write_text("pgfault 7\noom_kill 3\n")
    kills = MemoryKills(tmp_path)
    assert kills.excluded
    dead = "Subprocess scheduler_0 (pid=10703) crashed with exit code -9. Triggering SIGQUIT for cleanup..."
    told = diagnose(f"[2026-11-23 09:10:01] {dead}\n", was_ready=True, aside=aside_of(None, kills.excluded))
    assert told.cause == (
        "a process of the server was killed by a user or a program, not by the kernel for lack of memory "
        f"({dead} (the kernel counts no kill for lack of memory))"
    )
    vmstat.write_text("pgfault 8\noom_kill 4\n")
    assert not kills.excluded, "of whichever process"
    raised = SCHEDULER + f"[2026-11-23 09:10:02] {dead}\n"
    assert diagnose(raised, aside=aside_of(None, True)) == diagnose(raised), "an exception says more"


@pytest.mark.parametrize(("code", "excluded"), [(-9, True), (-9, False), (-7, False)])
def test_a_kill_while_a_disk_is_full_is_told_with_the_disk(code: int, excluded: bool) -> None:
    """The log may lack why: it lies on that disk."""
    aside = aside_of(Path("/data/runs"), excluded)
    told = diagnose("[2026-11-23 09:10:01] The server is fired up", code, was_ready=True, aside=aside)
    assert told.signature is not None and told.signature.name == "killed-while-a-disk-was-full"
    assert told.cause.endswith(
        f"(the main process ended with exit code {code} (no room is left on the disk of /data/runs))"
    )
    counted = diagnose("", code, "oom_kill counted 1 in the cgroup's memory.events", aside=aside)
    assert counted.signature is not None and counted.signature.name == "out-of-memory-ended-by-the-kernel"
    raised = diagnose(SCHEDULER, code, aside=aside)
    assert raised.cause == "ValueError: layer 1: expert 7 has no up_proj"


def test_the_share_that_is_too_small_for_the_weights_is_told(tmp_path: Path) -> None:
    raised = (
        "ValueError: Loaded weights leave no GPU memory for the KV cache under --mem-fraction-static=0.5. Raise it."
    )
    found = diagnose(SCHEDULER.replace("ValueError: layer 1: expert 7 has no up_proj", raised)).signature
    assert found is not None and found.key == "server.mem_fraction"


def test_version_1_of_cgroups_counts_too(tmp_path: Path) -> None:
    control = tmp_path / "sys/fs/cgroup/memory/box/memory.oom_control"
    control.parent.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("3:memory:/box\n")
    control.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 0\n")
    kills = MemoryKills(tmp_path)
    control.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    assert "counted 1" in kills.since()


def test_the_message_has_key_cause_line_fix_and_log() -> None:
    log = "[2026-11-23 09:10:01] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n"
    error = Crashed("the server ended (exit code 1)", diagnose(log), Path("/runs/x/server.log"))
    assert str(error) == (
        "server.mem_fraction: the server ended (exit code 1): the GPU has less free memory than the server asked for "
        "(torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.). Lower server.mem_fraction or "
        "server.max_total_tokens, or free the GPU (nvidia-smi shows who uses it). (its log is /runs/x/server.log; "
        "docs/troubleshooting.md#out-of-gpu-memory)"
    )
    assert error.exit_code == 3


def test_an_unknown_crash_is_told_with_one_full_stop() -> None:
    log = SCHEDULER.replace("ValueError: layer 1: expert 7 has no up_proj", "AssertionError: [5,192] is not [5,176].")
    error = Crashed("the server ended (exit code 1)", diagnose(log), Path("/runs/x/server.log"))
    message = "the server ended (exit code 1): AssertionError: [5,192] is not [5,176]. Its log is /runs/x/server.log"
    assert str(error) == f"server: {message}"


def test_a_mistake_that_our_own_code_found_in_the_server_is_told_as_the_launcher_tells_one() -> None:
    mistake = "/models/x is broken: NaN or infinity in 1 tensor: lm_head.weight. Get these files again."
    raised = f"kt_model.errors.LaunchError: model.path: {mistake}"
    found = diagnose(SCHEDULER.replace("ValueError: layer 1: expert 7 has no up_proj", raised))
    error = Crashed("the server ended (exit code 1)", found, Path("/runs/x/server.log"))
    ended = "The server ended (exit code 1); its log is /runs/x/server.log"
    assert str(error) == f"model.path: {mistake} {ended}"
    assert error.exit_code == 3
    assert found.configuration, "it would end the same way again"


def test_failures_of_the_proof_are_in_the_table() -> None:
    """Bugs 7 and 8 of the log never reach a log file: the proof tells them, in words that the table knows."""
    report: Any = {"layers": [{"layer": 1, "method": "AMXBF16_SFT", "reference_error": {"-1": 0.93}}]}
    with pytest.raises(ProofFailed) as gibberish:
        proof._check_reference(report)
    found = diagnose(str(gibberish.value)).signature
    assert found is not None and found.title == "The kernel computes something else"


def test_the_page_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
    made = subprocess.run(
        [sys.executable, "-m", "kt_launch.watching.diagnosis"], capture_output=True, text=True, check=True
    )
    assert made.stdout == troubleshooting_page()
    assert page.read_text() == made.stdout, "python -m kt_launch.watching.diagnosis > docs/troubleshooting.md"
