"""A package that SGLang imports is missing: the error itself is said, not that SGLang has changed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from bare_environment import make_environment
from launching import start

from kt_sglang.seams.imports import resolve

ERROR = "ModuleNotFoundError: No module named 'opentelemetry'"


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kt-launch in an environment in which FastAPI lacks one of its requirements."""
    return make_environment(tmp_path_factory.mktemp("bare") / "venv", without="opentelemetry-api")


def test_the_doctor_says_the_error_itself(command: Path) -> None:
    code = "from kt_launch.doctor.environment import check_seams; found = check_seams(); print(found.detail, found.fix)"
    done = subprocess.run([command.with_name("python"), "-c", code], capture_output=True, text=True, timeout=900)
    assert done.stdout.startswith(f"SGLang cannot be imported: {ERROR} Install the package that is missing"), done
    assert "gone" not in done.stdout and "sglang==" not in done.stdout


@pytest.mark.server
def test_the_launch_ends_with_the_error_itself(command: Path, tmp_path: Path) -> None:
    process = start("lora=none", "proof.whole_model=off", runs=tmp_path, command=command)
    assert process.wait(timeout=900) == 3
    said = (tmp_path / "stderr.txt").read_text()
    assert f"SGLang cannot be imported: {ERROR}" in said
    assert "differs" not in said and "sglang==" not in said


def test_a_path_is_resolved_through_modules_and_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "outer"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "there.py").write_text("class Thing:\n    def run(self): ...\n")
    (package / "broken.py").write_text("import no_such_package_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("outer.there.Thing.run").__name__ == "run"
    for gone in ("outer.moved.Thing", "outer.there.Other", "outer.there.Thing.stop"):
        with pytest.raises(AttributeError):
            resolve(gone)
    with pytest.raises(ModuleNotFoundError, match="no_such_package_at_all"):
        resolve("outer.broken.Thing")
