"""Runs that live on after the command that started them: detach, status, logs, stop, restarts."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from launching import ended_with_the_test, wait_until
from tiny_checkpoints import write_checkpoint
from written import write_per_expert

from kt_launch.machine.process_identity import ProcessIdentity
from kt_launch.running.server import serve
from kt_launch.runs.runs import read_plan
from kt_launch.runs.state import RunStateWriter, read_state
from kt_launch.watching.client import connect_to_start
from kt_launch.watching.diagnosis import SIGNATURES
from kt_launch.watching.readiness import PROBE
from kt_model.contract import START_HEADER
from kt_model.errors import LaunchErrors, ServerDidNotStart

Operations = Any
TAKE_TERMINAL = (
    "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"
)
"""Closing the terminal is told to what runs there, also where the tests themselves were started by nohup."""
FATAL = 'Scheduler hit an exception: Traceback (most recent call last):\n  File "x.py", line 1, in run\n{}'
"""What SGLang logs of a scheduler that dies."""
LAUNCHER = (sys.executable, "-P", "-m", "kt_launch.cli")


def detach(operations: Operations, behaviour: dict[str, Any] | None = None, **server: Any) -> Any:
    """A run of the stand-in, detached."""
    run = operations.recorded(**server)
    done = operations.call("action=replay", f"run={run.name}", "detach=true", behaviour=behaviour)
    assert done.returncode == 0, done.stderr
    return operations.latest()


def status(operations: Operations, *words: str) -> dict[str, Any]:
    """What action=status says."""
    done = operations.call("action=status", "format=json", *words)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_detached_run_is_found_followed_and_stopped(operations: Operations) -> None:
    recorded = operations.recorded()
    done = operations.call("action=replay", "detach=true", behaviour={"stutters": True})
    assert done.returncode == 0, done.stderr
    run = operations.latest()
    assert f"run: {run.folder}" in done.stdout.splitlines()
    assert f"ready: http://127.0.0.1:{recorded.plan['resolved']['server.port']['value']}" in done.stdout.splitlines()
    found = status(operations)
    assert (found["name"], found["state"], found["detached"]) == (run.name, "ready", True)
    assert psutil.pid_exists(found["launcher_pid"]) and psutil.pid_exists(found["server_pid"])
    assert "ready to roll" in operations.call("action=logs", "logs.lines=50").stdout
    assert operations.call("action=logs", "logs.lines=1").stdout.count("\n") == 1
    assert len(operations.processes()) >= 3
    stopped = operations.call("action=stop")
    assert stopped.stdout == f"{run.name}: stopped\n"
    assert operations.processes() == []
    found = status(operations, f"run={run.name}")
    assert (found["state"], found["exit_code"], found["server_pid"]) == ("ended", 130, None)
    assert operations.call("action=stop", f"run={run.name}").stdout == f"{run.name}: had already ended\n"


def test_the_death_of_a_detached_launcher_before_it_is_ready_is_told(operations: Operations) -> None:
    run = operations.recorded()
    words = ("action=replay", f"run={run.name}", "detach=true")
    done = operations.call(*words, behaviour={"kills its launcher": True})
    log = operations.latest().folder / "launcher.log"
    told = f"error: detach: its launcher was killed by SIGKILL before it was ready. Its log is {log}"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (3, told), done.stderr
    assert operations.call("action=stop", "run=latest").returncode == 0
    assert operations.processes() == []


def start_on_a_taken_port(operations: Operations, behaviour: dict[str, Any]) -> tuple[int, str]:
    """Planned while the port was free, started when this process had it. Returns the port and the launcher's stderr."""
    run = operations.recorded()
    port: int = run.plan["resolved"]["server.port"]["value"]
    with socket.create_server(("127.0.0.1", port)):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "kt_launch.running.launch", str(run.folder)],
            env=operations.environment(behaviour),
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 3, done.stderr
    assert "proof:" not in done.stdout and "ready:" not in done.stdout
    assert operations.processes() == []
    return port, done.stderr


def test_a_server_on_a_port_that_another_answers_on_is_not_called_ready(operations: Operations) -> None:
    port, told = start_on_a_taken_port(operations, {})
    problem = f"server.port: a server other than the one started here answers on http://127.0.0.1:{port}"
    assert f"{problem}: process {os.getpid()} (" in told


def test_a_server_that_waits_for_whoever_has_its_port_is_ended(operations: Operations) -> None:
    """As SGLang does when its warm-up gets no answer from there."""
    port, told = start_on_a_taken_port(operations, {"waits for its port": True})
    (error,) = [line for line in told.splitlines() if line.startswith("error: ")]
    problem = f"error: server.port: the server cannot listen on http://127.0.0.1:{port}: process {os.getpid()} ("
    assert error.startswith(problem)
    assert f") listens on port {port}" in error and "Set server.port=0 for a free port" in error


class Elsewhere(BaseHTTPRequestHandler):
    """A server of ours, of another start."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header(START_HEADER, "0f")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


def test_an_answer_that_bears_the_number_of_another_start_is_refused(operations: Operations) -> None:
    """Also where it cannot be seen who listens."""
    plan = operations.plan()
    with HTTPServer(("127.0.0.1", plan.value("server.port")), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        with connect_to_start(plan, 60, "0f") as client:
            assert client.get("/health").status_code == 200
        with (
            connect_to_start(plan, 60, "1f") as client,
            pytest.raises(ServerDidNotStart, match=r"server\.port: a server other than the one started here answers"),
        ):
            client.get("/health")
        server.shutdown()


def test_of_ten_launches_on_one_port_nine_learn_it_before_they_start_a_server(operations: Operations) -> None:
    """Planned while the port was free; and a plan that is made later is told, too."""
    port = operations.recorded().plan["resolved"]["server.port"]["value"]
    folders = [operations.recorded(port=port).folder for _ in range(10)]
    command = [sys.executable, "-P", "-m", "kt_launch.running.launch"]
    begun = {
        folder: subprocess.Popen(
            [*command, str(folder)],
            env=operations.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for folder in folders
    }
    (winner,) = _living(begun)
    ended = {each: process.communicate(timeout=300) for each, process in begun.items() if each != winner}
    told = f"error: server.port: {port} on 127.0.0.1 cannot be used: process {begun[winner].pid} ("
    for folder, (out, errors) in ended.items():
        assert begun[folder].returncode == 2 and "Traceback" not in errors, errors
        assert errors.startswith(told) and "ready:" not in out, errors
        assert not (folder / "server.log").exists(), "no server was started for nothing"
        state = read_state(folder)
        assert state is not None and (state.now, state.exit_code) == ("ended", 2)
    wait_until(lambda: read_state(winner).now == "ready")  # type: ignore[union-attr]
    with pytest.raises(LaunchErrors, match=rf"server.port: {port} on 127.0.0.1 cannot be used: process \d+ \("):
        operations.plan({"port": port})
    begun[winner].send_signal(signal.SIGINT)
    assert begun[winner].wait(timeout=300) == 130


def _living(begun: dict[Path, subprocess.Popen[str]]) -> list[Path]:
    """Those that go on when all others have ended."""
    wait_until(lambda: sum(process.poll() is None for process in begun.values()) <= 1)
    return [folder for folder, process in begun.items() if process.poll() is None]


def test_a_run_whose_launcher_was_killed_is_lost_and_its_orphans_are_ended(operations: Operations) -> None:
    run = detach(operations)
    state = read_state(run.folder)
    assert state is not None and state.launcher.send(signal.SIGKILL)
    wait_until(lambda: not state.launcher.alive)
    found = status(operations, f"run={run.name}")
    assert (found["state"], found["launcher_pid"]) == ("lost", None)
    assert found["server_pid"] is not None
    assert "its launcher was gone; ended 2 processes" in operations.call("action=stop", f"run={run.name}").stdout
    assert operations.processes() == []
    assert status(operations, f"run={run.name}")["state"] == "ended"


@contextlib.contextmanager
def read_by_somebody(terminal: int) -> Iterator[None]:
    """What is shown on a terminal is taken from it, which holds but a page of text."""
    over = threading.Event()

    def read() -> None:
        with contextlib.suppress(OSError):  # nobody has it open any more, as under nohup
            while not over.is_set():
                if select.select([terminal], [], [], 0.1)[0]:
                    os.read(terminal, 1 << 16)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield
    finally:
        over.set()
        reader.join()


def test_a_terminal_that_is_closed_stops_the_run_unless_nohup_keeps_it(operations: Operations) -> None:
    for words, state in ((), "ended"), (("nohup",), "ready"):
        name = operations.recorded().name
        master, terminal = os.openpty()
        command = [*words, *LAUNCHER, "action=replay", f"run={name}"]
        started = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, *command],
            cwd=operations.root / "elsewhere",
            env=operations.environment(),
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
        with ended_with_the_test(started) as launcher:
            os.close(terminal)
            with read_by_somebody(master):
                wait_until(lambda name=name: operations.latest().name != name and operations.latest().state == "ready")
            os.close(master)
            if not words:
                assert launcher.wait(timeout=300) == 130
            assert read_state(operations.latest().folder).now == state  # type: ignore[union-attr]
            assert bool(operations.processes()) == bool(words)
            launcher.terminate()
    assert operations.processes() == []


@pytest.mark.parametrize("dies", [False, True], ids=["coming up", "when it dies"])
def test_a_terminal_that_is_gone_without_a_signal_ends_the_run_in_order(operations: Operations, dies: bool) -> None:
    """As that of `docker exec -t` or ssh: this session has no controlling terminal, so that only writing tells it."""
    name = operations.recorded(restarts=3).name
    gone = operations.root / "the terminal is gone"
    behaviour = {"exits": [7], "exits with": str(gone)} if dies else {"comes up with": str(gone)}
    master, terminal = os.openpty()
    started = subprocess.Popen(
        [*LAUNCHER, "action=replay", f"run={name}"],
        cwd=operations.root / "elsewhere",
        env=operations.environment(behaviour),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    with ended_with_the_test(started) as launcher:
        os.close(terminal)
        state = "ready" if dies else "starting"
        with read_by_somebody(master):
            wait_until(lambda: operations.latest().name != name and operations.latest().state == state)
        os.close(master)
        gone.touch()
        assert launcher.wait(timeout=300) == (7 if dies else 130)
    found = read_state(operations.latest().folder)
    assert found is not None
    assert (found.now, found.exit_code, found.error) == ("ended", 7 if dies else 130, None)
    assert [attempt.ending for attempt in found.attempts] == ["exit code 7" if dies else "interrupted"]
    assert operations.processes() == []


def test_output_that_nobody_reads_any_more_stops_the_run(operations: Operations) -> None:
    name = operations.recorded().name
    words = [*LAUNCHER, "action=replay", f"run={name}"]
    started = subprocess.Popen(
        words,
        cwd=operations.root / "elsewhere",
        env=operations.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with ended_with_the_test(started) as launcher:
        assert launcher.stdout is not None and launcher.stderr is not None
        assert any(line.startswith("run: ") for line in launcher.stdout)
        launcher.stdout.close()
        assert "Traceback" not in launcher.stderr.read()
    assert launcher.returncode == 130
    found = status(operations, f"run={operations.latest().name}")
    assert (found["state"], found["ending"]) == ("ended", "exit code 130")
    assert operations.processes() == []


def test_a_crash_that_was_survived_is_not_why_a_run_ended(operations: Operations) -> None:
    behaviour = {"exits": [-9], "last words": "Subprocess scheduler_0 (pid=1) crashed with exit code -9."}
    run = detach(operations, behaviour, restarts=1)
    folder = run.folder
    wait_until(lambda: len(read_state(folder).attempts) == 2 and read_state(folder).now == "ready")  # type: ignore[union-attr]
    found = status(operations)
    assert (found["restarts"], found["state"]) == (1, "ready")
    assert operations.call("action=stop").returncode == 0
    found = status(operations, f"run={run.name}")
    assert (found["ending"], found["attempts"][1]["ending"]) == ("exit code 130", "interrupted")
    assert "a process of the server was killed" in found["attempts"][0]["cause"]


def test_a_number_that_another_process_has_by_now_is_left_alone(operations: Operations) -> None:
    run = operations.recorded()
    with ended_with_the_test(subprocess.Popen(["sleep", "600"], start_new_session=True)) as bystander:
        mark = ProcessIdentity.of(bystander.pid)
        other = replace(mark, start_ticks=mark.start_ticks - 1)
        stale = asdict(other)
        content = {"state": "ready", "launcher": stale, "server": stale, "url": "http://x", "detached": True}
        content |= {"metrics_url": None, "exit_code": None, "error": None, "attempts": []}
        (run.folder / "state.json").write_text(json.dumps(content))
        done = operations.call("action=stop", f"run={run.name}")
        assert done.stdout == f"{run.name}: had already ended\n"
        assert bystander.poll() is None
        assert not other.send(signal.SIGKILL)
        assert mark.send(signal.SIGKILL)


def test_a_crashed_server_is_started_again_with_growing_pauses_up_to_the_cap(operations: Operations) -> None:
    run = operations.recorded(restarts=2)
    behaviour = {"exits": [-9, -9, 7], "last words": "Subprocess scheduler_0 (pid=1) crashed with exit code -9."}
    done = operations.call("action=replay", f"run={run.name}", behaviour=behaviour)
    assert done.returncode == 7, done.stderr
    assert "starting the server again in 1 s (2 of 2 left)" in done.stderr
    assert "starting the server again in 2 s (1 of 2 left)" in done.stderr
    log = operations.latest().folder / "server.log"
    killed = [row.fix for row in SIGNATURES if row.name.startswith("killed")]  # which one, the machine decides
    assert len(killed) == 3 and any(f"{fix} Its log is {log}\n" in done.stderr for fix in killed)
    state = read_state(operations.latest().folder)
    assert state is not None
    assert [attempt.ending for attempt in state.attempts] == ["killed by SIGKILL", "killed by SIGKILL", "exit code 7"]
    assert "a process of the server was killed" in str(state.attempts[0].cause)
    assert sorted(log.name for log in operations.latest().folder.glob("server*.log")) == [
        "server.1.log",
        "server.2.log",
        "server.log",
    ]
    assert not (operations.latest().folder / "ready.json").exists()
    assert operations.processes() == []


@pytest.mark.parametrize(
    "behaviour",
    [
        {"exits": [1], "last words": FATAL.format("RuntimeError: Base weights not set")},
        {"exits": [1], "logs": {"2": "torch.OutOfMemoryError: CUDA out of memory."}},
    ],
    ids=["while it ran", "while it came up again"],
)
def test_a_crash_of_the_configuration_is_not_repeated(operations: Operations, behaviour: dict[str, Any]) -> None:
    run = operations.recorded(restarts=3)
    done = operations.call("action=replay", f"run={run.name}", behaviour=behaviour)
    state = read_state(operations.latest().folder)
    assert state is not None
    assert len(state.attempts) == 1 + ("logs" in behaviour)
    assert done.returncode == (3 if "logs" in behaviour else 1)


def test_an_hour_of_health_gives_all_restarts_back(
    operations: Operations, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the launcher's own measure of how long a server lived, in which only the clock is not real. After the second
    death none was left, but for that hour."""
    run = operations.recorded(restarts=1)
    monkeypatch.setenv("STAND_IN", json.dumps({"exits": [-9, -9, 7], "last words": ""}))
    looked = iter([0.0, 5.0, 10.0, 3610.0, 4000.0, 4005.0])
    assert serve(read_plan(run), run.folder, clock=lambda: next(looked)) == 7
    told = [line for line in capfd.readouterr().err.splitlines() if "starting the server again" in line]
    assert [line.partition(" in ")[2] for line in told] == ["1 s (1 of 1 left)", "1 s (1 of 1 left)"]
    state = read_state(run.folder)
    assert state is not None and (state.now, state.exit_code, len(state.attempts)) == ("ended", 7, 3)


def test_a_server_that_had_been_ready_restarts_after_it_ran_out_of_memory(operations: Operations) -> None:
    run = operations.recorded(restarts=1)
    words = FATAL.format("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")
    done = operations.call("action=replay", f"run={run.name}", behaviour={"exits": [1, 7], "last words": words})
    assert done.returncode == 7, done.stderr
    assert "the GPU has less free memory than the server asked for" in done.stderr
    assert len(read_state(operations.latest().folder).attempts) == 2  # type: ignore[union-attr]


def test_a_server_that_stands_still_is_not_called_ready_and_starts_again(operations: Operations) -> None:
    detach(operations, {"stops": True}, restarts=1, hang_timeout_s=6)
    run = operations.latest()
    wait_until(lambda: read_state(run.folder).now == "unresponsive")  # type: ignore[union-attr]
    launcher = read_state(run.folder).launcher  # type: ignore[union-attr]
    assert launcher.send(signal.SIGSTOP)  # a busy machine may take longer to ask than the launcher to call it a hang
    assert status(operations)["state"] == "unresponsive"
    assert launcher.send(signal.SIGCONT)
    wait_until(lambda: read_state(run.folder).now == "ready")  # type: ignore[union-attr]
    state = read_state(run.folder)
    assert state is not None and len(state.attempts) == 2
    assert state.attempts[0].ending == "hung"
    told = r"its schedulers have not answered for \d+ s \(server\.hang_timeout_s\)"
    assert re.fullmatch(told, str(state.attempts[0].cause)), state.attempts[0].cause
    assert "the server hangs: its schedulers have not answered" in (run.folder / "launcher.log").read_text()
    assert operations.call("action=stop").returncode == 0


def test_a_detokenizer_that_passes_on_nothing_is_a_hang(operations: Operations) -> None:
    """Deadlocked: it lives, no signal has stopped it, and schedulers answer as ever."""
    detach(operations, {"deadlocks": True}, restarts=1, hang_timeout_s=6)
    run = operations.latest()
    wait_until(lambda: read_state(run.folder).now == "unresponsive")  # type: ignore[union-attr]
    wait_until(lambda: read_state(run.folder).now == "ready")  # type: ignore[union-attr]
    state = read_state(run.folder)
    assert state is not None and [attempt.ending for attempt in state.attempts] == ["hung", None]
    told = str(state.attempts[0].cause)
    expected = r"its detokenizer has passed on nothing of what schedulers sent it for \d+ s \(server\.hang_timeout_s\)"
    assert re.fullmatch(expected, told), told
    log = (run.folder / "launcher.log").read_text()
    assert f"the server hangs: {told}. It is being stopped." in log
    assert ("stacks.txt" in log) == (run.folder / "stacks.txt").exists()
    assert operations.call("action=stop").returncode == 0


def test_a_detokenizer_that_ends_during_the_proof_ends_the_start(operations: Operations) -> None:
    """Requests would get no answer, and the proof waits for each of them for two minutes."""
    run = operations.recorded()
    done = operations.call("action=replay", f"run={run.name}", behaviour={"loses its detokenizer": True})
    log = operations.latest().folder / "server.log"
    lost = "sglang::detokenizer 600 ended, and the rest of the server goes on without it"
    assert (done.returncode, f"error: server: {lost}. Its log is {log}\n" in done.stderr) == (3, True), done.stderr
    assert operations.processes() == []


def test_a_disk_that_is_full_for_a_while_ends_no_supervision(operations: Operations) -> None:
    """As the launcher meets it: it may write no byte to any file, and later it may again."""
    detach(operations, {"stops": True}, restarts=1, hang_timeout_s=6)
    folder = operations.latest().folder
    state = read_state(folder)
    assert state is not None and state.server is not None
    resource.prlimit(state.launcher.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    written = (folder / "state.json").read_bytes()
    wait_until(lambda: not state.server.alive)
    assert (folder / "state.json").read_bytes() == written
    assert read_state(folder).state in ("ready", "unresponsive")  # type: ignore[union-attr]
    assert state.launcher.alive
    resource.prlimit(state.launcher.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    wait_until(lambda: len(read_state(folder).attempts) == 2 and read_state(folder).now == "ready")  # type: ignore[union-attr]
    assert read_state(folder).attempts[0].ending == "hung"  # type: ignore[union-attr]
    assert operations.call("action=stop").returncode == 0
    assert operations.processes() == []


def test_a_first_start_that_fails_is_told_by_its_signature_and_not_repeated(operations: Operations) -> None:
    run = operations.recorded(restarts=3)
    log = "ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 30000): address already in use"
    done = operations.call("action=replay", f"run={run.name}", "detach=true", behaviour={"log": log, "exit": 1})
    assert done.returncode == 3
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: server.port: the server ended (exit code 1): another process listens on a port")
    assert "docs/troubleshooting.md#port-in-use" in error
    folder = operations.latest().folder
    assert f"its log is {folder / 'server.log'}" in error
    assert len(read_state(folder).attempts) == 1  # type: ignore[union-attr]
    assert "exit code 3: server.port" in operations.call("action=runs").stdout


def test_a_server_that_computes_another_model_ends_the_launch(operations: Operations) -> None:
    """What the stand-in says of experts, adapters and names is right, and each of its logprobs is wrong."""
    model = write_checkpoint("qwen3_moe", operations.root / "whole")
    west = write_per_expert(operations.root / "whole west", model, [".experts.0.gate_proj", ".o_proj"])
    sections = {"lora": {"adapters": {"west": {"path": str(west)}}, "allow_missing": True}}
    plan = operations.plan(model={"path": str(model), "name": "tiny"}, proof={"text": "warn"}, **sections)
    assert plan.value("proof.whole_model") == "auto"
    done = operations.call("action=replay", f"run={operations.record(plan).name}")
    assert done.returncode == 4, done.stderr
    assert f"error: proof: the server does not compute the model of {model}: " in done.stderr
    assert "against transformers in float32. Worst: prompt " in done.stderr
    assert "Traceback" not in done.stderr and "ready:" not in done.stdout
    run = operations.latest()
    assert {file.name for file in (run.folder / "float32").iterdir()} >= {
        "request.json",
        "reference-0.npz",
        "served-0.npz",
    }
    assert read_state(run.folder).exit_code == 4  # type: ignore[union-attr]
    assert operations.processes() == []


def test_temporary_files_are_where_sockets_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import secrets
    import tempfile

    from kt_launch.runs import scratch
    from kt_model.errors import LaunchError

    start = secrets.token_hex(16)
    with scratch.scratch(start) as made:
        usual = made.environment
        assert set(usual) == {"TMPDIR", "TORCHINDUCTOR_CACHE_DIR"}
        assert not Path(usual["TORCHINDUCTOR_CACHE_DIR"]).is_relative_to(usual["TMPDIR"])
    assert not Path(usual["TMPDIR"]).exists()
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with tempfile.TemporaryDirectory(prefix="t", dir=scratch.SHORT[0]) as short:
        monkeypatch.setattr(scratch, "SHORT", (str(tmp_path / "none"), short))
        with scratch.scratch(start) as moved:
            assert Path(moved.environment["TMPDIR"]).parent == Path(short)
            assert Path(moved.environment["TORCHINDUCTOR_CACHE_DIR"]).parent == deep
        left = Path(short, "kt-launch-left")
        left.mkdir()
        (left / scratch.OWNER).touch()
        scratch.remove_abandoned()
        assert list(Path(short).iterdir()) == [] == list(deep.iterdir())
    with pytest.raises(LaunchError, match=r"TMPDIR: .* is too long for the server's sockets"), scratch.scratch(start):
        pass


def probe_exit_code(operations: Operations) -> int:
    """Of the command that probes of containers run."""
    command = (sys.executable, *PROBE[1:])
    return subprocess.run(command, env=operations.environment(), cwd=operations.root, timeout=300).returncode


def test_supervisors_are_told_and_metrics_are_those_that_are_listed(operations: Operations) -> None:
    import httpx
    from prometheus_client.parser import text_string_to_metric_families

    from kt_launch.watching.metrics import METRICS

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(operations.root / "notify"))
        operations.env["NOTIFY_SOCKET"] = str(operations.root / "notify")
        assert probe_exit_code(operations) == 1
        run = detach(operations, metrics_port=0)
        systemd.settimeout(300)  # it is told once the run's state is written, which ends the command
        assert systemd.recv(100) == b"READY=1"
    assert probe_exit_code(operations) == 0
    page = httpx.get(status(operations, f"run={run.name}")["metrics_url"], trust_env=False, timeout=120).text
    named = {line.split()[2] for line in page.splitlines() if line.startswith("# TYPE kt_launch_")}
    assert named == set(METRICS)
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    values = {(sample.name, *sample.labels.values()): sample.value for sample in samples}
    layers = 2
    assert values["kt_launch_expert_phase_seconds_total", "gate_up", "0"] == layers * 0.002
    assert (values["kt_launch_up",], values["kt_launch_adapters_loaded",]) == (1, 1)
    assert values["sglang:num_running_reqs", "tiny"] == 3
    kept, resident = (values["kt_launch_server_memory_bytes", pages] for pages in ("kept", "resident"))
    assert 2**22 < kept < resident < 2**30
    assert {sample.name for sample in samples if sample.name.startswith("sglang:e2e")} == {
        f"sglang:e2e_request_latency_seconds_{part}" for part in ("bucket", "sum", "count")
    }
    assert httpx.get(status(operations)["url"] + "/metrics", trust_env=False, timeout=120).status_code == 404
    assert operations.call("action=stop").returncode == 0
    assert probe_exit_code(operations) == 1
    assert operations.processes() == []


def test_a_run_whose_server_is_gone_is_not_called_ready_until_the_next_one_is(tmp_path: Path) -> None:
    """Also in the pause before it is started again."""
    writer = RunStateWriter(tmp_path, "http://127.0.0.1:1")
    said = []
    for answers in (True, False):
        writer.starting(os.getpid())
        writer.ready()
        writer.answers(answers)
        said.append(read_state(tmp_path).state)  # type: ignore[union-attr]
        writer.attempt_ended("killed by SIGKILL")
        said.append(read_state(tmp_path).state)  # type: ignore[union-attr]
    assert said == ["ready", "restarting", "unresponsive", "restarting"]
