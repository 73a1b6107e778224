"""An environment that holds what the extra `cpu` of pyproject.toml brings and nothing else: what a user has who
installs it, sglang without its dependencies, and our wheel, while the tests' own environment holds much more.

It is made of links to the packages that are installed here, which takes seconds; pip would take minutes and gigabytes.
Which distributions belong to it is computed as pip does, from the list and from what each distribution requires.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
BESIDE = ("sglang", "kt-launch")
"""What the Makefile installs besides the list; sglang without its own dependencies."""


def listed() -> list[Requirement]:
    """The lines of the list."""
    return [Requirement(line) for line in tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]["cpu"]]


def is_gpu_machine() -> bool:
    """Whether this environment is a GPU machine's, in which sglang brings its own requirements."""
    import torch

    return torch.version.cuda is not None


def distributions() -> dict[str, metadata.Distribution]:
    """By name, all that pip would install. Skips where this environment is a GPU machine's; fails where a line of the
    list is not installed as it says."""
    if is_gpu_machine():
        pytest.skip("this environment is a GPU machine's, in which sglang brings its own requirements")
    found: dict[str, metadata.Distribution] = {}
    waiting, seen = [*listed(), *map(Requirement, BESIDE)], set()
    while waiting:
        wanted = waiting.pop()
        name, key = canonicalize_name(wanted.name), (canonicalize_name(wanted.name), frozenset(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        found[name] = metadata.distribution(wanted.name)
        assert wanted.specifier.contains(found[name].version, prereleases=True), f"{wanted}: {found[name].version}"
        waiting += [] if name == "sglang" else _required(found[name], wanted.extras)
    return found


def _required(distribution: metadata.Distribution, extras: Iterable[str]) -> Iterator[Requirement]:
    for line in distribution.requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": each}) for each in ("", *extras)):
            yield requirement


def make_environment(folder: Path, without: str = "") -> Path:
    """Make it, but for one distribution; the path of its kt-launch."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--symlinks", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    names = {canonicalize_name(each.name) for each in metadata.distributions()}
    installed = map(metadata.distribution, names)  # the one that is imported, where a name is there twice
    owners = Counter(entry for each in installed for entry in {_entry(file) for file in _files(each)})
    for distribution in (each for name, each in distributions().items() if name != without):
        files = _files(distribution)
        for entry in {_entry(file) for file in files}:
            # Where other distributions have a part of an entry, as of a namespace package, it is linked file by file.
            for name in [file for file in files if _entry(file) == entry] if owners[entry] > 1 else [entry]:
                _link(Path(str(distribution.locate_file(name))), packages / name)
    command = folder / "bin" / "kt-launch"
    command.write_text(f"#!{folder}/bin/python\nimport sys\nfrom kt_launch.cli import main\n\nsys.exit(main())\n")
    command.chmod(0o755)
    return command


def _files(distribution: metadata.Distribution) -> list[str]:
    """What it put into site-packages; its own list, as `Distribution.files` looks each of them up on the disk."""
    rows = csv.reader((distribution.read_text("RECORD") or "").splitlines())
    return [row[0] for row in rows if not row[0].startswith(("..", "/", "__pycache__"))]


def _entry(file: str) -> str:
    return file.partition("/")[0]


def _link(source: Path, place: Path) -> None:
    if source.exists() and not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(source)
