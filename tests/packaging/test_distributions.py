"""What `make wheel` makes, in environments of each Python that it is for, with nothing in them but what pip installs:
there the demo is planned. A Python that this machine has not is skipped by name.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3600)]
DIST, TOOLS = (Path(__file__).parents[2] / name for name in ("dist", ".venv-wheel"))
PLACES = (".pyenv/versions/{version}.*/bin/python{version}", ".local/share/uv/python/*-{version}.*/bin/python{version}")
"""Below the home folder, where pyenv and uv keep theirs."""


def run(*command: str | Path, **options: str | Path) -> str:
    """To its end, which has to be a good one; its stdout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("KT_", "PYTHON"))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=options.get("cwd"))
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def interpreters(version: str) -> Iterator[Path]:
    if found := shutil.which(f"python{version}"):
        yield Path(found)
    for place in PLACES:
        yield from sorted(Path.home().glob(place.format(version=version)), reverse=True)


@pytest.fixture(scope="module", params=["3.11", "3.12", "3.13"])
def python(request: pytest.FixtureRequest) -> Path:
    for found in interpreters(request.param):
        done = subprocess.run([found, "-c", "import sys, ensurepip; print(*sys.version_info[:2], sep='.')"],
                              capture_output=True, text=True)  # fmt: skip
        if done.stdout.strip() == request.param:
            return found
    pytest.skip(f"no Python {request.param} on this machine")


@pytest.fixture(scope="module")
def sdist() -> Path:
    for found in DIST.glob("kt_launch-*.tar.gz"):
        return found
    pytest.skip("there is no dist/kt_launch-*.tar.gz; make wheel makes it, and make nightly does before its tests")


@pytest.fixture(scope="module")
def wheel(python: Path, sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repaired one: that of `make wheel`, or made here for another Python."""
    tag = "cp" + "".join(python.name.removeprefix("python").split("."))
    if found := next(DIST.glob(f"kt_launch-*-{tag}-manylinux*.whl"), None):
        return found
    folder = tmp_path_factory.mktemp("wheel")
    run(new_environment(python, folder / "venv"), "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, sdist)
    (built,) = folder.glob("*.whl")
    repair = f'PATH="{TOOLS / "bin"}:$PATH" auditwheel repair --wheel-dir "{folder / "dist"}" "{built}"'
    run("bash", "-c", repair)
    (found,) = (folder / "dist").glob("*-manylinux*.whl")
    return found


def new_environment(python: Path, folder: Path) -> Path:
    """Its interpreter."""
    run(python, "-m", "venv", folder)
    return folder / "bin" / "python"


@pytest.mark.parametrize("which", ["sdist", "wheel"])
def test_it_is_installed_and_plans_the_demo(
    which: str, python: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    distribution: Path = request.getfixturevalue(which)
    installed = new_environment(python, tmp_path / "venv")
    run(installed, "-m", "pip", "install", "-q", distribution)
    words = ("action=plan", "format=json", "server.device=cpu")
    plan = json.loads(run(installed.with_name("kt-launch"), *words, cwd=tmp_path))
    resolved = {key: found["value"] for key, found in plan["resolved"].items()}
    assert Path(resolved["model.path"]).is_relative_to(tmp_path / "venv")
    assert resolved["model.moe_layers"] > 0 and resolved["kt.method"] == "bf16"
    assert plan["argv"][1:4] == ["-P", "-m", "kt_sglang.server"]
    kernels = "import kt_kernels, sys; sys.exit(not kt_kernels.compiled_isas())"
    run(installed, "-c", kernels)
