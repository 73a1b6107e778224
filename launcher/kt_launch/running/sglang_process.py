"""One SGLang process with all of its children: starts it on a written plan, waits until it listens, proves it, watches
it, and leaves nothing behind.

Not here: what is started (plan.py), what counts as proof (proof.py), what the terminal shows (progress.py), why it died
(diagnosis.py).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import httpx

from kt_launch.cluster.hosts import Hosts
from kt_launch.cluster.peer import HostGone
from kt_launch.machine.oom import MemoryKills
from kt_launch.machine.ports import listens, port_owner
from kt_launch.machine.processes import compilers_of, end_session, ending_of, session_processes, start_session
from kt_launch.machine.shared_memory import SHARED
from kt_launch.proving import proof
from kt_launch.proving.content import prove_content
from kt_launch.proving.generate import generate
from kt_launch.proving.graphs import prove_replay
from kt_launch.proving.prefill import prove_prefill
from kt_launch.proving.whole_model import Float32Run
from kt_launch.runs.scratch import scratch
from kt_launch.runs.state import RunStateWriter
from kt_launch.watching.client import another_answers, connect_to_start, server_url, without_proxy
from kt_launch.watching.diagnosis import ENDS_ITSELF, Crashed, Diagnosis, aside_of, diagnose
from kt_launch.watching.liveness import Liveness, Unresponsive
from kt_launch.watching.peak_memory import PeakMemory
from kt_launch.watching.progress import Progress
from kt_launch.watching.supervision import first_full
from kt_model.atomic_file import read_end
from kt_model.contract import LAUNCHER, RUN_FOLDER, START
from kt_model.errors import LaunchError, ProofFailed, ServerDidNotStart
from kt_model.plan import SERVER_COMMAND, LaunchPlan
from kt_model.system_errors import launch_error_of

ANSWER_S = 120.0
POLL_S = 0.2
SAMPLE_S, START_SAMPLE_S = 5.0, 1.0
"""Interval at which the server's processes are recorded, to tell later which of them the kernel killed."""
CANNOT_LISTEN = "error while attempting to bind on address"
"""asyncio's words in the server's log when its port, or its address, is refused."""
END_S = 2.0
"""How long a server that cannot listen gets to end by itself."""


class SGLangProcess:
    """SGLang in its own session, so that all of its processes can be found and stopped."""

    def __init__(self, plan: LaunchPlan, run_folder: Path, hosts: Hosts) -> None:
        self._plan, self._run_folder, self._hosts = plan, run_folder, hosts
        self._command = [plan.argv[0], *SERVER_COMMAND, str(run_folder / "plan.json")]
        self.log_file = run_folder / "server.log"
        self.url = server_url(plan)
        self._start = secrets.token_hex(16)
        self.client = connect_to_start(plan, ANSWER_S, self._start)
        self._kills = MemoryKills()
        self._memory = PeakMemory(plan, run_folder)
        self._pids: set[int] = set()
        self._compilers: list[str] = []
        self._sampled_at = 0.0
        self._was_ready = False

    def __enter__(self) -> SGLangProcess:
        keep_log(self.log_file)
        own = {START: self._start, LAUNCHER: str(os.getpid()), RUN_FOLDER: str(self._run_folder)}
        with contextlib.ExitStack() as around:
            self._scratch = around.enter_context(scratch(self._start))
            around.enter_context(self._memory)
            direct = without_proxy(os.environ, [self.url])
            environment = {**os.environ, **direct, **self._scratch.environment, **self._plan.env, **own}
            try:
                self._process = start_session(self._command, self.log_file, environment)
            except OSError as failure:
                raise _not_begun(failure) from failure
            self._around = around.pop_all()
        self.pid = self._process.pid
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._sampled_at = 0.0
        self._sample()
        end_session(self.pid)
        self._process.wait()
        self._around.close()
        if self._was_ready and (peak := self._memory.line()):
            print(f"kt-launch: memory: {peak}", file=sys.stderr, flush=True)

    def wait_ready(self, progress: Progress) -> None:
        """Follow the log until SGLang says that it listens, then request one token.

        Raises ServerDidNotStart if one of its processes ends, if its port is taken, on a timeout, or if the token does
        not come.
        """
        for line in self._new_lines(progress):
            if CANNOT_LISTEN in line:
                raise self._cannot_listen()
            if "ready to roll" in line:
                break
        self._require_own_port()
        try:
            generate(self.client, text="Hello")
        except (httpx.HTTPError, ValueError, ProofFailed) as error:
            reason = error.problem if isinstance(error, ProofFailed) else error
            raise self._did_not_start(f"the first generation failed: {reason}") from error
        self._was_ready = True

    def wait_proven(self, progress: Progress) -> None:
        """For a part: follow the log until host 0 says that the server is proven. Raises as wait_ready does."""
        for _ in self._new_lines(progress):
            pass
        self._was_ready = True

    def prove(self, float32: Float32Run, progress: Progress) -> proof.Proof:
        """Runs the proof; if the server, or a part of it, dies during it, the server did not start."""
        with self._ended_without_a_part() as lost:
            try:
                return self._prove(float32, progress)
            except (httpx.HTTPError, LaunchError) as error:
                if lost:
                    raise ServerDidNotStart("server", lost[0], f"Its log is {self.log_file}") from error
                if isinstance(error, LaunchError):
                    raise
                raise self._did_not_start(f"the server did not answer during the proof ({error})") from error

    def _prove(self, float32: Float32Run, progress: Progress) -> proof.Proof:
        plan = self._plan
        progress.at("experts, adapters and names")
        found = proof.prove(plan, self.client)
        progress.at("text, and the whole model in float32")
        found = replace(found, content=prove_content(plan, self.client, float32, found.replicas))
        progress.at("long prompts")
        if prefill := prove_prefill(plan, self.client):
            found = replace(found, prefill=asdict(prefill), prefill_lines=tuple(prefill.lines()))
        if plan.value("server.cuda_graph") != "off":
            progress.at("replayed steps")
            found = replace(found, replay_difference=prove_replay(plan, self.client))
        return replace(found, listener=self._require_own_port())

    @contextlib.contextmanager
    def _ended_without_a_part(self) -> Iterator[list[str]]:
        """If a process of the server ends within the block and the others go on, they are ended, because requests would
        wait in vain; the list then says what is missing."""
        lost: list[str] = []
        over, parts = threading.Event(), Liveness(self.pid, lambda _: self.client, 0)

        def watch() -> None:
            while not over.wait(POLL_S):
                try:
                    parts.require_working()
                except Unresponsive as gone:
                    lost.append(str(gone))
                    self._process.kill()
                    return

        watching = threading.Thread(target=watch, name="parts", daemon=True)
        watching.start()
        try:
            yield lost
        finally:
            over.set()
            watching.join()

    def _require_own_port(self) -> str:
        """The process that listens on the port, for the proof. Raises ServerDidNotStart if it does not belong to this
        start; each answer's start number is checked in addition."""
        own = self._listens()
        if own is False:
            raise another_answers(self.url, port_owner(self._plan.value("server.port")))
        return proof.OF_THIS_START if own else f"{proof.NOT_SEEN} {self.url}"

    def _listens(self) -> bool | None:
        """Whether this server is what listens on its port; None if unknown or nobody does."""
        host, port = self._plan.value("server.host"), self._plan.value("server.port")
        return listens((process.pid for process in session_processes(self.pid)), host, port)

    def wait(self, state_writer: RunStateWriter) -> int:
        """Block until the server's main process ends; returns its exit code (negative: the signal that ended it).

        Raises Unresponsive if it hangs; the run's state shows that some time before.
        """
        silence_s = float(self._plan.config["server"].get("hang_timeout_s", 0))
        timeout_s = 0 if self._hosts.is_part else silence_s
        with Liveness(self.pid, lambda s: connect_to_start(self._plan, s, self._start), timeout_s) as liveness:
            while self._process.poll() is None:
                self._sample()
                self._hosts.require_all()
                liveness.require_working()
                state_writer.answers(liveness.answers)
                time.sleep(POLL_S)
        return self._process.returncode

    def diagnose(self) -> Diagnosis:
        """Why it ended, judged by its log, its exit code, the kernel's counters and the room on its disks."""
        log, kills = read_end(self.log_file), self._kills.since(self._pids)
        aside = aside_of(first_full([self._run_folder, SHARED]), self._kills.excluded)
        return diagnose(log, self._process.poll(), kills, self._was_ready, aside)

    def ending(self, code: int) -> str:
        """How its main process ended."""
        by_itself = code == -signal.SIGKILL and ENDS_ITSELF in read_end(self.log_file)
        return "SGLang stopped it" if by_itself else ending_of(code)

    def _new_lines(self, progress: Progress) -> Iterator[str]:
        """The lines of the log as they come, which progress has seen; for a part, until the server is proven."""
        timeout_s = float(self._plan.config["server"]["start_timeout_s"])
        deadline = time.monotonic() + timeout_s
        line = ""
        with self.log_file.open(encoding="utf-8", errors="replace") as log:
            while True:
                line += log.readline()
                if line.endswith("\n"):
                    progress.log_line(line.rstrip("\n"))
                    yield line
                    line = ""
                elif self._hosts.is_part and self._hosts.others_ready:
                    return
                elif self._process.poll() is not None:
                    raise self._did_not_start(f"the server ended ({self.ending(self._process.returncode)})")
                elif time.monotonic() > deadline:
                    raise self._did_not_start(f"not ready after {timeout_s:g} s (server.start_timeout_s)")
                else:
                    self._require_hosts()
                    self._sample()
                    progress.compiling(self._compilers)
                    time.sleep(POLL_S)

    def _require_hosts(self) -> None:
        try:
            self._hosts.require_all()
        except HostGone as gone:
            raise ServerDidNotStart("server.nodes", str(gone), "Its log says why; start both again.") from gone

    def _sample(self) -> None:
        if time.monotonic() - self._sampled_at >= (SAMPLE_S if self._was_ready else START_SAMPLE_S):
            self._sampled_at = time.monotonic()
            processes = session_processes(self.pid)
            living, self._compilers = {process.pid for process in processes}, compilers_of(processes)
            self._pids |= {self.pid, *living}
            self._memory.watch(self._pids)
            self._scratch.shared.look(living)

    def _cannot_listen(self) -> ServerDidNotStart:
        """SGLang ends only after its own warm-up request, which whoever has the port may never answer."""
        try:
            what = f"the server ended ({self.ending(self._process.wait(END_S))})"
        except subprocess.TimeoutExpired:
            what = f"the server cannot listen on {self.url}"
        return self._did_not_start(what)

    def _did_not_start(self, what: str) -> ServerDidNotStart:
        found, port = self.diagnose(), self._plan.value("server.port")
        if found.signature and found.signature.key == "server.port" and self._listens() is False:
            cause = f"{port_owner(port) or 'another process'} listens on port {port}"
            found = replace(found, signature=replace(found.signature, cause=cause))
        return Crashed(what, found, self.log_file)


def _not_begun(failure: OSError) -> ServerDidNotStart:
    """The system's refusal before a process existed: of its log, or of the process itself."""
    known = launch_error_of(failure) or LaunchError("server", f"its process cannot be started ({failure.strerror})")
    return ServerDidNotStart(known.where, known.problem, known.fix)


def keep_log(log_file: Path) -> None:
    """Rename the log of an earlier attempt of this run: server.1.log, server.2.log, …"""
    if log_file.exists():
        kept = sum(1 for _ in log_file.parent.glob(f"{log_file.stem}.*{log_file.suffix}"))
        log_file.rename(log_file.with_name(f"{log_file.stem}.{kept + 1}{log_file.suffix}"))
