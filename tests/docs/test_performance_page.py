"""The tokens per second that docs/performance.md opens with are the milliseconds of docs/gpu.md."""

from __future__ import annotations

import re

from docs_pages import ROOT

REQUESTS = (1, 4, 16, 64)
PROMPT = 2048
NOT_MEASURED = "–"


def measured() -> dict[str, list[str]]:
    """`BF16, base` -> milliseconds at each number of requests, and of the prompt."""
    found, method = {}, ""
    for line in (ROOT / "docs" / "gpu.md").read_text().splitlines():
        if heading := re.match(r"\| (BF16|INT8|INT4), ", line):
            method = heading[1]
        elif method and line.startswith("|"):
            name, *cells = (cell.strip(" *") for cell in line.strip("|").split("|"))
            found[f"{method}, {name.removeprefix('served, ')}"] = cells
        elif not line.startswith("|"):
            method = ""
    return found


def test_the_page_opens_with_what_was_measured() -> None:
    text = (ROOT / "docs" / "performance.md").read_text()
    first = text.partition("## ")[2].partition("## ")[0]
    rows = [line.strip("|").split("|") for line in first.splitlines() if re.match(r"\| (BF16|INT8|INT4),", line)]
    assert len(rows) > 8
    for row in rows:
        name, *cells = (cell.strip() for cell in row)
        *steps, prompt = measured()[name]
        expected = [f"{count * 1000 / float(ms):.0f}" for count, ms in zip(REQUESTS, steps, strict=True)]
        read = NOT_MEASURED if prompt == NOT_MEASURED else f"{PROMPT * 1000 / float(prompt):,.0f}"
        assert cells == [*expected, read], name
