"""The repository's pages, cut into what the tests look at."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEFT_OUT = (".venv", ".git", "build", "dist", "node_modules", ".pytest_cache")


def markdown_pages() -> list[Path]:
    """All pages of the checkout."""
    found = (page.relative_to(ROOT) for page in ROOT.rglob("*.md"))
    return sorted(page for page in found if not any(part.startswith(LEFT_OUT) for part in page.parts))


def prose(page: Path) -> str:
    """A page without what is inside code blocks."""
    lines = (ROOT / page).read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith("    "))


def anchors(page: Path) -> set[str]:
    """What headings are called in links, as GitHub forms it."""
    headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_lines(page: Path) -> list[str]:
    """Lines of indented and fenced code blocks, without what holds them together."""
    lines, fenced = [], False
    for line in (ROOT / page).read_text().splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line.strip())
    return lines
