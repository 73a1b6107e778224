"""docs/first-hour.md has the commands of demo/first_hour.py, which ran them; by night they run again."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from docs_pages import ROOT

SCRIPT = ROOT / "demo" / "first_hour.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("first_hour", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["first_hour"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_of_these_steps(script: ModuleType) -> None:
    text = (ROOT / "docs" / "first-hour.md").read_text()
    typed = [
        command.replace("REPOSITORY", "<URL of this repository>") for step in script.STEPS for command in step.commands
    ]
    assert re.findall(r"^\$ (.*)$", text, re.MULTILINE) == typed
    counts = re.findall(r"^\| (.+) \| (\d+) \| \d+ \|$", text, re.MULTILINE)
    assert counts == [(step.title, str(len(step.commands))) for step in script.STEPS]
    assert text.count("The capital of France is Paris, I reckon.") == 4


@pytest.mark.nightly
def test_the_steps_work_with_what_is_installed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    words = [sys.executable, str(SCRIPT), "--installed", "--page", str(page)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert page.read_text().count("The capital of France is Paris, I reckon.") == 3
