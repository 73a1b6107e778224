"""The commands of the pages work as they stand there.

A command that starts a server is planned instead (action=plan in its place; the served tests start servers). Folders of
the pages' reader are tiny checkpoints and adapters here; a command about a recorded run meets none and says so.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from docs_pages import code_lines, markdown_pages
from tiny_files import write_adapter, write_checkpoint
from weight_files import write_float8

from kt_launch.cli import main
from kt_launch.config.actions import ACTIONS
from kt_launch.doctor import Finding, environment
from kt_launch.gathering import rates

STARTING = ("serve", "bench", "chat", "route")
PAGES = ("--help", "--version", "--completion", "--cfg", "help", "version", "-V")
ABOUT_RUNS = ("replay", "status", "logs", "stop", "diff", "adapters")
NO_SUCH = r"error: (runs?: (no run|no living run|there is no run)|adapters\.url: no server answers at ).*\n"
FOR_ANOTHER_MACHINE = "--config run.yaml"
"""Its folders are here; on the machine of docs/first-hour.md they are missing."""
PLACES = {
    "~/models/merged": "made/own-merged",
    "~/adapters/chef": "loras/chef",
    "~/models/mine": "models/DeepSeek-V2-Lite-Chat",
    "~/adapters/west": "loras/Kllama2_deepseekV2_WEST_ALL",
    "/models/DeepSeek-V2-Lite-Chat": "models/DeepSeek-V2-Lite-Chat",
    "/models/merged": "made/merged",
    "/models/V3-BF16": "made/V3-BF16",
    "/models/V3": "models/V3",
    "/weights/int4": "made/int4",
    "/adapters]": "loras]",
    "/adapters/west": "loras/Kllama2_deepseekV2_WEST_ALL",
    "/adapters/chef": "loras/chef",
    "/shared/sweep": "made/sweep",
}
PRESETS = {
    "model/mixtral.yaml": "folder: Mixtral-8x7B-Instruct-v0.1\nname: mixtral\n",
    "lora/chef.yaml": "# @package lora.adapters.chef\nfolder: chef\n",
}


def commands() -> Iterator[tuple[str, str, str]]:
    """(page, command, error) without a comment or what follows two spaces; the first page, where several have the same.
    error: where the page shows one below the command, what it is about."""
    found: set[str] = set()
    for page in markdown_pages():
        lines = code_lines(page)
        prompt = "$ " if any(line.startswith("$ ") for line in lines) else ""  # where output stands among them
        for line, below in itertools.pairwise([*lines, ""]):
            if not line.startswith(prompt):
                continue
            command = re.split(r"\s{2,}|\s#", line.removeprefix("$ "))[0]
            if re.match(r"kt-launch(\s|$)", command) and "…" not in command and command not in found:
                found.add(command)
                error = re.match(r"error: ([^ :]+):", below)
                yield str(page), command, error[1] if error and FOR_ANOTHER_MACHINE not in command else ""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reader's folders."""
    root = tmp_path_factory.mktemp("reader")
    write_checkpoint(root / "models" / "DeepSeek-V2-Lite-Chat")
    for name in ("Kllama2_deepseekV2_WEST_ALL", "chef"):
        write_adapter(root / "loras" / name)
    write_float8(root / "models" / "V3")
    write_checkpoint(root / "models" / "Mixtral-8x7B-Instruct-v0.1", "mixtral")
    model = root / "models" / "DeepSeek-V2-Lite-Chat"
    (root / "run.yaml").write_text(f"model:\n  path: {model}\n")
    for name, text in PRESETS.items():
        (root / "my" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "my" / name).write_text(text)
    return root


def words_of(command: str, places: Path) -> list[str]:
    shown = "|".join(map(re.escape, sorted(PLACES, key=len, reverse=True)))
    command = re.sub(shown, lambda found: str(places / PLACES[found[0]]), command)
    command = command.replace("--config-dir my", f"--config-dir {places / 'my'}")
    command = re.sub(r"kt\.cpuinfer=[\w(),]+", "kt.cpuinfer=1", command)  # the reader's machine is larger
    command = command.replace("--config run.yaml", f"--config {places / 'run.yaml'}")
    words = shlex.split(command.partition(" > ")[0])[1:]
    return [word for word in words if not word.startswith("hydra.launcher.")]


@pytest.fixture(autouse=True)
def seams_checked_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at SGLang takes seconds; tests/plugin/test_seams.py has one, and here action=doctor says the same."""
    monkeypatch.setattr(environment, "check_seams", lambda: Finding("pass", "SGLang hooks match"))


@pytest.fixture(autouse=True)
def rates_measured_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """So does measuring this machine, which tests/launcher/test_sizing.py does."""
    monkeypatch.setattr(rates, "_measure", lambda *_: replace(rates.read_rates("avx2", *_), host=rates.HERE))


@pytest.mark.parametrize(("page", "command", "error"), list(commands()))
def test_the_command_works(
    page: str,
    command: str,
    error: str,
    places: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, folder in (("RUNS", tmp_path / "runs"), ("MODELS", places / "models"), ("LORAS", places / "loras")):
        monkeypatch.setenv(f"KT_LAUNCH_{name}", str(folder))
    monkeypatch.setenv("KT_LAUNCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    words = words_of(command, places)
    named = [word for word in words if word.startswith("action=") or word in ACTIONS]
    action = named[0].removeprefix("action=") if named else "serve"
    is_about_a_run = action in ABOUT_RUNS or "RUN" in words
    if action in STARTING and not is_about_a_run and not any(word in PAGES for word in words):
        words = [word for word in words if word not in named and not word.startswith(("sweep=", "detach="))]
        words.append("action=plan")
        words += ["server.device=cpu"]
        if any(word.startswith("kt.method=int") for word in words):
            words.append("kt.prepare=true")
    code = main(words)
    message = capfd.readouterr().err
    if error:
        assert code == 2 and message.startswith(f"error: {error}: "), message
    elif is_about_a_run:
        assert code == 2 and re.fullmatch(NO_SUCH, message), message
    else:
        assert code in (0, 1 if action == "doctor" else 0), message


def test_enough_commands_are_found() -> None:
    assert len(list(commands())) > 30
