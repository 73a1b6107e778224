"""The Dockerfile of the checkout: read as docker reads it, its files are there, its probe is ours; built by night."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
from docs_pages import ROOT
from hadolint import require_sound_dockerfile

from kt_launch.config.schema import read_fields
from kt_launch.watching.readiness import PROBE

INSTRUCTIONS = {
    *("FROM", "RUN", "WORKDIR", "COPY", "ARG", "ENV", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT"),
    *("CMD", "ADD", "LABEL", "ONBUILD", "SHELL", "USER"),
}


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) without comments, lines joined."""
    text = re.sub(r"\\\n", "", re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE))
    pairs = (line.partition(" ") for line in text.splitlines() if line.strip())
    return [(name, " ".join(rest.split())) for name, _, rest in pairs]


def last(name: str) -> str:
    return [rest for found, rest in instructions() if found == name][-1]


def test_every_line_is_an_instruction_and_the_first_one_names_the_base() -> None:
    assert {name for name, _ in instructions()} <= INSTRUCTIONS
    assert instructions()[0][0] == "FROM"


def test_its_linter_finds_nothing() -> None:
    require_sound_dockerfile((ROOT / "Dockerfile").read_text())


def test_what_is_copied_is_there_and_is_all_that_the_build_reads() -> None:
    copied = [word for name, rest in instructions() if name == "COPY" for word in rest.split()[:-1]]
    assert all((ROOT / word).exists() for word in copied)
    sources = re.findall(r"find ([\w/ ]+) -type f", (ROOT / "Makefile").read_text())[0].split()
    assert {word.split("/")[0] for word in sources} <= {word.rstrip("/") for word in copied}


def test_the_probe_and_the_command_are_those_of_this_version() -> None:
    assert json.loads(last("HEALTHCHECK").partition("CMD ")[2]) == list(PROBE)
    command, *words = json.loads(last("ENTRYPOINT"))
    assert command == "kt-launch"
    keys = {key for key, _ in read_fields()}
    assert {word.partition("=")[0] for word in words} <= keys
    assert f"server.port={last('EXPOSE')}" in words
    assert all(isinstance(folder, str) for folder in json.loads(last("VOLUME")))


@pytest.mark.nightly
def test_it_builds_and_says_its_version() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "info"], capture_output=True).returncode:
        pytest.skip("no docker runs here")
    built = subprocess.run([docker, "build", "-q", "-t", "kt-launch:test", ROOT], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    run = [docker, "run", "--rm", "--entrypoint", "kt-launch", "kt-launch:test", "--version"]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.startswith("kt-launch ")
