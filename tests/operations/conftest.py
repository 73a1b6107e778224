"""Runs of the stand-in server: the launcher, its files, its processes and its HTTP are real."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from forked_launcher import call_forked
from tiny_files import write_adapter, write_checkpoint

from kt_launch.config.schema import Config
from kt_launch.config.sources import Sources
from kt_launch.gathering.facts import prepare
from kt_launch.machine.host import read_host
from kt_launch.running.launch import record
from kt_launch.runs.lock import read_lock
from kt_launch.runs.runs import Run, read_run, read_runs
from kt_model.errors import Problems
from kt_model.plan import LaunchPlan

LAUNCHER = (sys.executable, "-P", "-m", "kt_launch.cli")


def make_plan(folder: Path, server: Mapping[str, Any] | None = None, **sections: Any) -> LaunchPlan:
    """A plan on a tiny checkpoint and adapter in `folder`, made there if they are not there yet."""
    model, adapter = folder / "model", folder / "west"
    if not model.exists():
        write_checkpoint(model, vocab_size=512)
        write_adapter(adapter)
    values = {
        "model": {"path": str(model), "name": "tiny"},
        "lora": {"adapters": {"west": {"path": str(adapter)}}},
        "kt": {"cpuinfer": 1},
        "proof": {"whole_model": "off", "text": "warn"},
        **sections,
        "server": {"device": "cpu", "start_timeout_s": 240.0, **(server or {})},
    }
    return prepare(Config.model_validate(values), Sources(), Problems())


@dataclass
class Operations:
    """A folder of runs, and the launcher called on it from elsewhere."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def plan(self, server: Mapping[str, Any] | None = None, **sections: Any) -> LaunchPlan:
        """The one that is recorded, with sections of the config in the place of its own."""
        return make_plan(self.root, server, **sections)

    def recorded(self, **server: Any) -> Run:
        """A run as serve records it, not started."""
        return self.record(make_plan(self.root, server))

    def record(self, plan: LaunchPlan) -> Run:
        """The same of a plan of one's own."""
        _, folder = record(plan, str(self.runs), ["model=auto"], read_lock(plan, read_host(), ["model=auto"]))
        return read_run(folder)

    def call(
        self, *words: str, behaviour: dict[str, Any] | None = None, timeout: float = 300, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """kt-launch with these words, to its end, forked from this process."""
        return call_forked(words, self.root / "elsewhere", self.environment(behaviour) | env, timeout)

    def start(
        self, *words: str, behaviour: dict[str, Any] | None = None, timeout: float = 300, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """The same, started as from a shell."""
        return subprocess.run(
            [*LAUNCHER, *words],
            cwd=self.root / "elsewhere",
            env=self.environment(behaviour) | env,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def environment(self, behaviour: dict[str, Any] | None = None) -> dict[str, str]:
        own = {"KT_LAUNCH_RUNS": str(self.runs), "KT_LAUNCH_CACHE": str(self.root / "cache")}
        return {**os.environ, **own, **self.env, "STAND_IN": json.dumps(behaviour or {})}

    def latest(self) -> Run:
        """The newest run whose plan is recorded; a folder that a launcher has only just made has none yet."""
        return read_runs(self.runs)[-1]

    def processes(self) -> list[psutil.Process]:
        """Every living process that was started on a run folder here, and what it started."""
        found = []
        for process in psutil.process_iter():
            try:
                if str(self.root) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found += [process, *process.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
        return found


@pytest.fixture
def operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Operations]:
    """An empty folder of runs, where the stand-in is the plugin; whatever a failed test leaves running is ended."""
    package = tmp_path / "stand_in" / "kt_sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(Path(__file__).parent / "stand_in.py", package / "server.py")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    (tmp_path / "elsewhere").mkdir()
    made = Operations(tmp_path)
    yield made
    for process in made.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture
def changed_byte() -> Callable[[Path], None]:
    """Flips the last byte of a file and sets its time of change back."""

    def flip(file: Path) -> None:
        before = file.stat()
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    return flip


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a folder."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))
