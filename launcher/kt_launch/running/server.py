"""The servers of a run, one after another: brings each up, records its state, says that it is ready, and how it ended.

Not here: the process itself (sglang_process.py), whether a dead server is restarted (supervision.py).
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kt_launch.cluster.adapters import restore
from kt_launch.cluster.hosts import Hosts
from kt_launch.cluster.peer import HostGone
from kt_launch.machine.ports import held_ports
from kt_launch.machine.processes import Stopped, ending_of, in_foreground, session_processes, stopped_by
from kt_launch.machine.streams import OutputGone, words_may_be_lost
from kt_launch.proving.whole_model import Float32Run
from kt_launch.running.sglang_process import SGLangProcess
from kt_launch.runs.best_effort import best_effort
from kt_launch.runs.lock import LockCompletion
from kt_launch.runs.state import RunStateWriter
from kt_launch.watching.client import server_url
from kt_launch.watching.diagnosis import Diagnosis
from kt_launch.watching.liveness import Unresponsive, write_stacks
from kt_launch.watching.progress import Progress
from kt_launch.watching.readiness import tell_systemd
from kt_launch.watching.ready_lines import ready_lines
from kt_launch.watching.supervision import Ending, supervise, wait_for_room
from kt_model.contract import READY_FILE
from kt_model.errors import EXIT_INTERRUPTED, EXIT_NOT_STARTED, EXIT_OK, EXIT_TOO_LONG, LaunchError, full_stop
from kt_model.jsonfile import write_json
from kt_model.plan import LaunchPlan
from kt_model.printable import printable, say, under_label
from kt_model.system_errors import in_users_words

PROOF_FILE, STACKS_FILE = "proof.json", "stacks.txt"
PROVEN = "proven, and another job may follow"


def serve(
    plan: LaunchPlan,
    run_folder: Path,
    *,
    detached: bool = False,
    until_proven: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Run the planned server until it is interrupted or ends by itself, and restart it after a crash if the plan says
    so; or run it only until it is proven, if another job follows.

    `run_folder` holds the written plan.json, which is all that the server is given; server.log, timings.json,
    proof.json, state.json and lock.json are written into it, and ready.json as long as it is ready. Returns 130 after
    an interrupt, else the server's own exit code. Raises ServerDidNotStart or ProofFailed; no process of the server is
    left in any case.

    clock: measures the server's life in seconds, without the time that the machine was suspended.
    """
    record = RunStateWriter(run_folder, server_url(plan), detached)
    try:
        held = held_ports(plan.value("server.host"), {"server.port": plan.value("server.port")})
        with in_users_words(), words_may_be_lost(), held:
            code = Servers(plan, run_folder, record, until_proven, clock).serve_until_interrupted()
    except LaunchError as failure:
        record.ended(failure.exit_code, str(failure))
        raise
    except BaseException as bug:
        record.ended(1, repr(bug))
        raise
    record.ended(code)
    return code


@dataclass(frozen=True)
class Servers:
    """The servers of one run, one after another."""

    plan: LaunchPlan
    folder: Path
    record: RunStateWriter
    until_proven: bool
    clock: Callable[[], float]

    def _pause(self, seconds: float) -> None:
        """Before another start."""
        time.sleep(seconds)
        wait_for_room(self.folder, time.sleep)

    def serve_until_interrupted(self) -> int:
        restarts = int(self.plan.config["server"].get("restarts") or 0)
        with stopped_by(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            try:
                say(f"run: {self.folder}")
                with LockCompletion(self.plan, self.folder), self._own_pages():
                    return supervise(self._serve_once, restarts, self._pause)
            except Stopped as stop:
                if stop.by_hand:
                    with contextlib.suppress(OutputGone):
                        print("kt-launch: interrupted, the server is stopped", file=sys.stderr, flush=True)
                return EXIT_INTERRUPTED
            except OutputGone:
                return EXIT_INTERRUPTED

    @contextlib.contextmanager
    def _own_pages(self) -> Iterator[None]:
        """The launcher's own HTTP pages; without server.metrics_port and playground_port nothing, not even an
        import."""
        ports = self.plan.config["server"]
        with contextlib.ExitStack() as pages:
            if (port := ports.get("metrics_port")) is not None:
                from kt_launch.watching.metrics import exported

                pages.enter_context(exported(self.plan, self.folder, self.record, int(port)))
            if (port := ports.get("playground_port")) is not None:
                from kt_launch.watching.playground import served

                pages.enter_context(served(self.plan, self.record, int(port)))
            yield

    def _serve_once(self) -> Ending:
        """One server from its start to its end."""
        with Hosts(self.plan) as hosts, SGLangProcess(self.plan, self.folder, hosts) as process:
            self.record.starting(process.pid)
            try:
                self._bring_up(process, hosts.is_part)
                hosts.say_ready()
                self.record.ready()
                tell_systemd()
                ready_at = self.clock()
                if self.until_proven:
                    self.record.attempt_ended(PROVEN)
                    print(f"ended: {PROVEN}; detach=true would leave it running", flush=True)
                    return Ending(EXIT_OK, 0.0)
                code = process.wait(self.record)
            except Unresponsive as hung:
                return self._end_hung(process, str(hung), self.clock() - ready_at)
            except HostGone as gone:
                say(f"kt-launch: {full_stop(str(gone))} The part of the server on this host is ended.", file=sys.stderr)
                self.record.attempt_ended("another host is gone", str(gone))
                return Ending(EXIT_NOT_STARTED, self.clock() - ready_at)
            except (Stopped, OutputGone):
                self.record.attempt_ended("interrupted")
                raise
            except LaunchError as failure:
                self.record.attempt_ended("did not start", failure.problem)
                raise
            finally:
                (self.folder / READY_FILE).unlink(missing_ok=True)
            found = process.diagnose() if code else Diagnosis(None)
            self.record.attempt_ended(ending_of(code), found.cause or None)
            watched = _say_ended(process, code, found)
            lived_s = self.clock() - ready_at
            return Ending(code if code >= 0 else 128 - code, lived_s, found.configuration, watched)

    def _end_hung(self, process: SGLangProcess, problem: str, lived_s: float) -> Ending:
        """Record what its processes were doing; they are killed when the process's context ends."""
        stacks = self.folder / STACKS_FILE
        with best_effort(stacks):
            write_stacks(stacks, session_processes(process.pid))
        where = f" What its processes were doing is in {stacks}." if stacks.exists() else ""
        print(f"kt-launch: the server hangs: {problem}. It is being stopped.{where}", file=sys.stderr, flush=True)
        self.record.attempt_ended("hung", problem)
        return Ending(EXIT_TOO_LONG, lived_s)

    def _bring_up(self, process: SGLangProcess, is_part: bool) -> None:
        lines = self._wait_proven(process) if is_part else self._prove(process)
        with best_effort(self.folder / READY_FILE):
            write_json(self.folder / READY_FILE, {"url": process.url, "pid": process.pid})
        for line in lines:
            say(under_label(printable(line), sys.stdout), kept="\n")

    def _prove(self, process: SGLangProcess) -> Iterator[str]:
        """Returns what to say of it."""
        with Float32Run(self.plan, self.folder) as float32, Progress(self.plan, self.folder) as progress:
            process.wait_ready(progress)
            progress.phase("proof")
            found = process.prove(float32, progress)
            with best_effort(self.folder / PROOF_FILE):
                write_json(self.folder / PROOF_FILE, found.as_dict())
            restore(process.client, self.folder)
            progress.phase("ready")
        ready = ready_lines(self.plan, self.folder, in_foreground(), self.record.state.playground_url)
        shown = itertools.islice(ready, 1 if self.until_proven else None)
        return itertools.chain((f"proof: {line}" for line in found.lines()), shown)

    def _wait_proven(self, process: SGLangProcess) -> Iterator[str]:
        """For a part of a server, which host 0 proves and answers for."""
        with Progress(self.plan, self.folder) as progress:
            process.wait_proven(progress)
            progress.phase("ready")
        number, count, meeting = (self.plan.value(f"server.{key}") for key in ("node_rank", "nodes", "rendezvous"))
        return iter([f"ready: host {number} of {count}; host 0 ({meeting}) answers requests"])


def _say_ended(process: SGLangProcess, code: int, found: Diagnosis) -> bool:
    """Print why the server ended; returns whether anybody could read it."""
    cause = f": {found.cause}" if found.cause else ""
    fix = f" {found.signature.key}: {found.signature.fix}" if found.signature else ""
    ended = full_stop(f"the server ended unexpectedly ({process.ending(code)}){cause}")
    try:
        say(f"kt-launch: {ended}{fix} Its log is {process.log_file}", file=sys.stderr)
    except OutputGone:
        return False
    return True
