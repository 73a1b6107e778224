"""Every link of the pages leads somewhere, and every file that a page names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from docs_pages import ROOT, anchors, markdown_pages, prose

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
NAMED_FILE = re.compile(r"`((?:launcher|plugins|kernels|conf|tests|demo|docs|benchmarks|requirements)/[\w./-]+)`")


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


def test_the_patterns_find_something() -> None:
    assert any(LINK.search(prose(page)) for page in markdown_pages())
    assert any(NAMED_FILE.search(prose(page)) for page in markdown_pages())
