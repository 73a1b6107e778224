"""ARCHITECTURE.md's rooms and arrows against the imports in the code, and no circle between files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

from docs_pages import ROOT

PACKAGES = {"kt_model": "launcher", "kt_launch": "launcher", "kt_sglang": "plugins", "kt_kernels": "kernels"}
ROW = re.compile(r"^\| `(?P<room>[\w./]+)` \| (?P<on>[^|]*) \|", re.MULTILINE)


@cache
def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in (ROOT / folder / package).rglob("*.py"):
            name = ".".join(file.relative_to(ROOT / folder).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = file
    return found


@cache
def nodes(module: str) -> list[ast.AST]:
    """All of a module's syntax tree."""
    return list(ast.walk(ast.parse(modules()[module].read_text())))


def imports(module: str) -> Iterator[str]:
    """The modules of ours that a module imports, inside functions and for types only too."""
    for node in nodes(module):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{name.name}" for name in node.names]
            yield from (name if name in modules() else node.module for name in names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


@cache
def arrows() -> set[tuple[str, str]]:
    """(module, module it imports)."""
    return {(one, other) for one in modules() for other in imports(one) if other in modules() and other != one}


def package_of(module: str) -> str:
    """`kt_launch/planning` for a module in it, `kt_launch/cli.py` for a file beside the rooms, else the package."""
    parts = module.split(".")
    if parts[0] not in ("kt_launch", "kt_sglang") or len(parts) == 1:
        return parts[0]
    folder = (ROOT / PACKAGES[parts[0]] / parts[0] / parts[1]).is_dir()
    return f"{parts[0]}/{parts[1]}" if folder else f"{parts[0]}/{parts[1]}.py"


def pictured() -> set[tuple[str, str]]:
    """The arrows of the table in ARCHITECTURE.md."""
    rows = ROW.finditer((ROOT / "ARCHITECTURE.md").read_text())
    return {(row["room"], on) for row in rows for on in re.findall(r"`([\w./]+)`", row["on"])}


def test_the_code_has_the_arrows_of_the_picture_and_no_others() -> None:
    built = {(package_of(one), package_of(other)) for one, other in arrows()}
    built = {(one, other) for one, other in built if one != other}
    drawn = pictured()
    assert drawn, "no table of rooms in ARCHITECTURE.md"
    assert built - drawn == set(), "imports that the picture does not have"
    assert drawn - built == set(), "arrows of the picture that no import has"


def test_no_files_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {module: set() for module in modules()}
    for one, other in arrows():
        graph[one].add(other)
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_rooms_stand_on_each_other_in_floors() -> None:
    graph: dict[str, set[str]] = {}
    for one, other in pictured():
        graph.setdefault(one, set()).add(other)
    TopologicalSorter(graph).prepare()


def test_only_the_room_of_the_machine_reads_it() -> None:
    """Files of the kernel, processes and cards are looked at in one place only."""
    readers = set()
    for module in modules():
        if not module.startswith(("kt_launch", "kt_model")) or package_of(module) == "kt_launch/machine":
            continue
        texts = [node.value for node in nodes(module) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        imported = {name.name for node in nodes(module) if isinstance(node, ast.Import) for name in node.names}
        if "psutil" in imported or any(text.startswith(("/proc", "/sys/", "proc/", "nvidia-smi")) for text in texts):
            readers.add(module)
    assert readers == set()


def test_no_script_is_importable_as_the_package_kernels_which_sglang_needs() -> None:
    """Python puts a script's folder first in its path."""
    assert not [file for folder in ("benchmarks", "tests", "demo") for file in (ROOT / folder).rglob("kernels.py")]
    assert not (ROOT / "kernels" / "__init__.py").exists()
