"""SECURITY.md: each threat names what holds and the tests that show it, and these are there."""

from __future__ import annotations

from docs_pages import ROOT

ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (ROOT / "SECURITY.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| threat |")
]


def test_each_threat_names_its_tests() -> None:
    assert len(ROWS) > 10
    for threat, holds, shown_by in ROWS:
        assert threat and holds, shown_by
        for name in shown_by.rstrip(" |").split(", "):
            file = ROOT / name
            assert file.is_file() and "def test_" in file.read_text(), f"{threat}: there is no {name}"


def test_what_is_not_promised_and_how_to_report_are_said() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## What is promised",
        "## What is not",
        "## How to report",
    ]
