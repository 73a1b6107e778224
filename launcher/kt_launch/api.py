"""The launcher from Python: Server and plan. They accept what the command line accepts, and process it in the same way
(Hydra, validation, resolving, a recorded run). The server's launcher runs in a child process, so that it is independent
of the caller's threads, event loops and signal handlers.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from kt_model.errors import LaunchError, LaunchErrors, ProofFailed, ServerDidNotStart
from kt_model.plan import LaunchPlan, served_ids

if TYPE_CHECKING:
    import httpx
    import openai

    from kt_launch.actions import Job

__all__ = ["LaunchError", "LaunchErrors", "LaunchPlan", "ProofFailed", "Server", "ServerDidNotStart", "plan"]

GROUPS = ("model", "lora", "server", "sweep")
"""Keys whose plain value chooses a preset or a folder."""
NOT_HERE = ("action", "detach", "run", "runs", "key")
ANSWER_S = 600.0

Started = TypeVar("Started")

_composing = threading.Lock()
"""Hydra keeps one state per process."""


def plan(
    *overrides: str, config: str | Path | None = None, config_dir: str | Path | None = None, **keys: Any
) -> LaunchPlan:
    """What would be started and why, as `kt-launch plan` shows it; starts nothing. Accepts the same arguments as
    Server. Raises LaunchErrors with every mistake."""
    from kt_launch.gathering.facts import prepare

    job = _job(overrides, config, config_dir, keys)
    return prepare(job.config, job.sources, job.problems)


class Server:
    """A proven server, from `with` (or start()) to its end.

        with Server(model="/models/DeepSeek-V2-Lite-Chat", lora="/adapters/west", kt={"method": "int8"}) as server:
            server.client().chat.completions.create(model=server.ids[-1], messages=[...])

    Keys are those of the command line: `server={"port": 30000}`, or whole words, `Server("server.port=30000")`.
    config is a file of kt-launch config, config_dir a folder of presets. What the launcher says goes to sys.stdout and
    sys.stderr unless quiet. The server ends with the block, with stop(), and with this process, however that goes.
    """

    def __init__(
        self,
        *overrides: str,
        config: str | Path | None = None,
        config_dir: str | Path | None = None,
        quiet: bool = False,
        **keys: Any,
    ) -> None:
        self._given = (overrides, config, config_dir, keys)
        self._quiet = quiet
        self._end: weakref.finalize[Any, Any] | None = None
        self._plan: LaunchPlan | None = None
        self._folder: Path | None = None
        self._url = ""

    def start(self) -> Server:
        """Start and prove it. Raises LaunchErrors, ServerDidNotStart or ProofFailed, and then leaves nothing
        running."""
        if self.running:
            return self
        from kt_launch.gathering.facts import prepare
        from kt_launch.running.child_launcher import ChildLauncher
        from kt_launch.running.launch import record
        from kt_model.printable import printable

        job = _job(*self._given)
        planned = prepare(job.config, job.sources, job.problems)
        self._plan, self._folder = record(planned, job.config.paths.runs, job.overrides)
        for warning in planned.warnings:
            self._tell(f"warning: {printable(warning)}\n", sys.stderr)
        child = ChildLauncher(self._folder)
        child.start(self._tell, lambda line: self._tell(line, sys.stderr))
        self._url = child.url
        self._end = weakref.finalize(self, child.stop)
        return self

    def stop(self) -> None:
        """Stop the server and wait until all of its processes have ended; does nothing if it has already ended."""
        if self._end is not None:
            self._end()

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        """Whether it was started and not yet stopped."""
        return self._end is not None and self._end.alive

    @property
    def plan(self) -> LaunchPlan:
        """The plan it was started from."""
        return _started(self._plan)

    @property
    def run_folder(self) -> Path:
        """Its run folder: plan.json, server.log, proof.json, timings.json."""
        return _started(self._folder)

    @property
    def url(self) -> str:
        """Its address, such as http://127.0.0.1:30000; the OpenAI API is below /v1."""
        return _started(self._url or None)

    @property
    def ids(self) -> list[str]:
        """The names that requests can use: the base model, then each adapter as <model>:<adapter>."""
        return served_ids(self.plan)

    def client(self, **options: Any) -> openai.OpenAI:
        """An OpenAI client for it, with its key; options are passed to openai.OpenAI. Raises LaunchError if the package
        openai is not installed; http() does not need it."""
        try:
            import openai
        except ModuleNotFoundError as missing:
            problem = "the package openai is not installed, which Server.client() returns a client of"
            raise LaunchError("openai", problem, "Run pip install openai, or use Server.http().") from missing
        import httpx

        from kt_launch.watching.client import ALONE

        own = {"base_url": f"{self.url}/v1", "api_key": self._key() or "none", "timeout": ANSWER_S}
        # trust_env: a proxy cannot reach this machine
        own["http_client"] = httpx.Client(trust_env=False, timeout=ANSWER_S, limits=ALONE)
        return openai.OpenAI(**own | options)

    def http(self) -> httpx.Client:
        """An HTTP client for it, with its key: server.http().post("/v1/chat/completions", json={...})."""
        from kt_launch.watching.client import connect

        _started(self._url or None)
        return connect(self.plan, ANSWER_S)

    def _key(self) -> str | None:
        from kt_launch.watching.client import Keys

        return Keys(list(self.plan.argv)).key

    def _tell(self, line: str, file: TextIO | None = None) -> None:
        if not self._quiet:
            print(line, end="", flush=True, file=file)

    def __repr__(self) -> str:
        return f"<kt_launch.Server {self._url if self.running else 'not running'}>"


def _started(value: Started | None) -> Started:
    if value is None:
        raise LaunchError("Server", "it was not started", "Use it in a with block, or call start() first.")
    return value


def _job(
    overrides: Sequence[str], config: str | Path | None, config_dir: str | Path | None, keys: Mapping[str, Any]
) -> Job:
    """The result of parsing these words as a command line."""
    from kt_launch.cli import compose_one, validated
    from kt_launch.commandline.arguments import read_arguments
    from kt_launch.config.compose import Composer, hydra_of_others_kept
    from kt_model.errors import Problems
    from kt_model.redaction import hide_typed

    words = [*overrides, *as_words(keys)]
    for word in words:
        _require_key(word)
    flags = [f"--config={os.fspath(config)}"] if config is not None else []
    with _composing, hydra_of_others_kept():
        arguments = read_arguments(hide_typed([*flags, *words]))
        composer, problems = Composer(None if config_dir is None else os.fspath(config_dir)), Problems()
        right = composer.check(arguments.overrides, False, problems)
        return validated(compose_one(composer, right, problems), problems)


def _require_key(word: str) -> None:
    key, has_value, _ = word.partition("=")
    if not has_value or word.startswith("-"):
        raise LaunchError(word, "key=value is expected", "Flags are arguments here: config=…, config_dir=….")
    if key.partition(".")[0] in NOT_HERE:
        raise LaunchError(key, "it belongs to the command kt-launch", "Python has Server and plan.")


def as_words(keys: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Keys and values as a person would type them: nested dictionaries as dotted keys, values in Hydra's grammar."""
    words: list[str] = []
    for name, value in keys.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            words += as_words(value, f"{key}.")
        else:
            words.append(f"{key}={_choice(value)}" if key in GROUPS else _word(key, value))
    return words


def _word(key: str, value: Any) -> str:
    from kt_launch.config.dump import hydra_override

    plain = [_plain(item) for item in value] if isinstance(value, list | tuple) else _plain(value)
    return hydra_override(key, plain)


def _choice(value: Any) -> str:
    """For presets and folders: one, or a list in which {"name": …, "path": …} is the user's own adapter."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_plain(part)}' for name, part in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(_choice(item) for item in value)}]"
    return "none" if value is None else str(_plain(value))


def _plain(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value
