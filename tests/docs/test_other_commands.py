"""Commands of the pages that are not kt-launch's (those are test_commands.py's): each kind is run, or checked as far as
it can be without a download, and a kind that is not known here fails.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Mapping

import pytest
from docs_pages import ROOT, markdown_pages

SHELL = ("make", "curl", "pip", "uv", "docker", "conda", "python", "bash", "echo", "swift", "export")
NOT_RUN = {
    "conda": "brings Python and a compiler, which are here already",
    "swift": "another project's; its settings are those of its own pages",
    "docker": "the Dockerfile is checked in test_dockerfile.py, and built by `make nightly` where docker runs",
}
RUN_ELSEWHERE = {
    "echo 'What is the capital of France?' | kt-launch chat chat.temperature=0": "tests/server/test_talking.py",
    "echo 'What is the capital of France?' | kt-launch chat": "tests/server/test_talking.py",
    "export KT_LAUNCH_MODELS=/models KT_LAUNCH_LORAS=/adapters": "tests/docs/test_commands.py",
}
"""Commands, and the test that runs them."""
ROUTES = ("/v1/chat/completions", "/load_lora_adapter", "/unload_lora_adapter")
"""RequestHandler in tests/server and tests/adapters/test_loading.py."""
ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")


def shell_commands() -> Iterator[tuple[str, str]]:
    """(page, command), with the lines that a backslash or an open quote continues."""
    for page in markdown_pages():
        if page.name in ("CHANGELOG.md", "ARCHITECTURE.md"):
            continue
        waiting = ""
        for line in (ROOT / page).read_text().splitlines():
            text = line.strip()
            if not waiting and not (line.startswith("    ") and text.split(" ")[0] in SHELL):
                continue
            waiting = f"{waiting} {text}".strip()
            if waiting.endswith("\\"):
                waiting = waiting[:-1]
                continue
            if waiting.count("'") % 2:
                continue
            yield str(page), re.split(r"\s{2,}(?=\S)|\s#", waiting)[0] if waiting.startswith("make") else waiting
            waiting = ""


def check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {word for word in words[1:] if "=" not in word} <= targets


def check_curl(words: list[str]) -> None:
    (address,) = (word for word in words if word.startswith("http://"))
    assert re.fullmatch(rf"http://127\.0\.0\.1:3000[01]({'|'.join(ROUTES)})", address)
    assert isinstance(json.loads(words[words.index("-d") + 1]), dict)


def check_pip(words: list[str]) -> None:
    """Files are there, pins are those that the project installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [pin for extra in project["optional-dependencies"].values() for pin in extra]
    for before, word in itertools.pairwise(words):
        if before == "-r":
            assert (ROOT / word).is_file()
        elif "==" in word:
            assert word in pins
        elif word.endswith(".whl"):
            assert word == "dist/kt_launch-*.whl"  # of `make wheel`: tests/packaging installs one
        elif word.startswith("kt-launch["):
            assert word.removeprefix("kt-launch[").removesuffix("]") in project["optional-dependencies"]


def check_script(words: list[str]) -> None:
    script = next(word for word in words[1:] if not word.startswith("-"))
    if not script.endswith((".py", ".sh")):
        script = f"launcher/{words[words.index('-m') + 1].replace('.', '/')}.py"
    assert (ROOT / script).is_file()
    if script.endswith(".sh"):
        subprocess.run(["bash", "-n", ROOT / script], check=True)
    else:
        compile((ROOT / script).read_text(), script, "exec")


def check_elsewhere(words: list[str]) -> None:
    text = next(text for text in RUN_ELSEWHERE if shlex.split(text) == words)
    assert (ROOT / RUN_ELSEWHERE[text]).is_file()


CHECKS: Mapping[str, Callable[[list[str]], None]] = {
    "make": check_make,
    "curl": check_curl,
    "pip": check_pip,
    "uv": lambda words: check_pip(words[1:]),
    "python": check_script,
    "bash": check_script,
    "echo": check_elsewhere,
    "export": check_elsewhere,
}


@pytest.mark.parametrize(("page", "command"), list(shell_commands()))
def test_the_command_is_checked_or_marked(page: str, command: str) -> None:
    words = shlex.split(command, comments=True)
    assert (words[0] in CHECKS) != (words[0] in NOT_RUN)
    if words[0] in CHECKS:
        CHECKS[words[0]](words)


@pytest.mark.parametrize("page", sorted({page for page, _ in shell_commands()}))
def test_a_server_that_is_asked_was_given_that_port(page: str) -> None:
    """One that is given none takes any free port."""
    asked = {port for of, command in shell_commands() for port in ADDRESS.findall(command) if of == page}
    text = (ROOT / page).read_text()
    assert [port for port in asked if f"port={port}" not in text] == []


def test_enough_commands_are_found() -> None:
    assert {command.split(" ")[0] for _, command in shell_commands()} >= {"make", "curl", "pip", "docker"}
