"""Every link of the pages leads somewhere; every file, key and environment variable that a page names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from docs_pages import ROOT, anchors, markdown_pages, prose

from kt_launch import Server
from kt_launch.config.schema import in_dictionary, read_fields
from kt_launch.planning.rules import RULES

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
NAMED_FILE = re.compile(r"`((?:launcher|plugins|kernels|conf|tests|demo|docs|benchmarks|requirements)/[\w./-]+)`")
SOURCES = ("launcher", "plugins", "kernels", "conf", "tests", "demo", "docs", "benchmarks")
SOURCE = re.compile(r"(?<![\w/.`<*-])`?((?:[\w-]+/)*[\w-]+\.(?:py|cpp|cu|ptx|h|sh))\b")
NAMED_KEY = re.compile(
    r"`((?:model|lora|kt|server|proof|bench|sweep|export|chat|fit|paths|hub)\.(?!json)[a-z_.]*[a-z_])\b(?![(/-])"
)
VARIABLE = re.compile(r"\bKT_LAUNCH_[A-Z_]+\b")
OTHERS_FILES = {"alloc_cpu.cpp", "ProcessGroupNCCL.cpp"}
"""Of torch, in lines of its logs."""
OTHERS_NAMES = {"model.embed_tokens"}
"""Of tensors."""


@pytest.mark.parametrize("page", markdown_pages(), ids=str)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    broken = []
    for target in LINK.findall(prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page.parent / path).resolve() if path else ROOT / page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", markdown_pages(), ids=str)
def test_named_files_are_there(page: Path) -> None:
    missing = [name for name in NAMED_FILE.findall(prose(page)) if not (ROOT / name).exists()]
    assert missing == []


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """What each file of the checkout holds that is not a page, by its path."""
    found = (path for folder in SOURCES for path in (ROOT / folder).rglob("*") if path.suffix not in (".md", ".pyc"))
    return {f"/{path.relative_to(ROOT)}": path.read_text(errors="replace") for path in found if path.is_file()}


@pytest.mark.parametrize("page", markdown_pages(), ids=str)
def test_sources_that_are_named_without_their_folder_are_somewhere(page: Path, sources: dict[str, str]) -> None:
    named = {*SOURCE.findall((ROOT / page).read_text())} - OTHERS_FILES
    assert [name for name in named if not any(path.endswith(f"/{name}") for path in sources)] == []


@pytest.mark.parametrize("page", markdown_pages(), ids=str)
def test_named_keys_are_there(page: Path) -> None:
    known = {*(key for key, _ in read_fields()), *RULES, *(f"server.{name}" for name in dir(Server))} | OTHERS_NAMES
    sections = {key.rpartition(".")[0] for key in known}
    named = {*NAMED_KEY.findall(prose(page))}
    assert [key for key in named - known - sections if not in_dictionary(key)] == []


@pytest.mark.parametrize("page", markdown_pages(), ids=str)
def test_named_variables_are_read_somewhere(page: Path, sources: dict[str, str]) -> None:
    named = {*VARIABLE.findall((ROOT / page).read_text())}
    code = [text for path, text in sources.items() if not path.startswith(("/tests/", "/docs/"))]
    assert [name for name in named if not any(name in text for text in code)] == []


def test_the_patterns_find_something() -> None:
    assert any(LINK.search(prose(page)) for page in markdown_pages())
    assert any(NAMED_FILE.search(prose(page)) for page in markdown_pages())
    assert any(NAMED_KEY.search(prose(page)) for page in markdown_pages())
    assert SOURCE.findall("`a/b.py`, (c.cpp) and d.h") == ["a/b.py", "c.cpp", "d.h"]
