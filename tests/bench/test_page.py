"""The report page: alone in the world, correct markup, and looked at in a real browser at desktop and phone width."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from bench_rows import some_rows
from browser import NAMES, browsing, find_browser, show
from playwright.sync_api import Browser

from kt_launch.sweeps.folder import Row
from kt_launch.sweeps.page import to_html
from kt_launch.sweeps.plots import nice_ticks, power_of

VOID = {"meta", "br", "link", "img", "input", "hr"}
WIDTHS = (1280, 390)
LONG = "model.path=/" + "a_very_long_folder_name_without_any_break/" * 4 + "checkpoint"


class Markup(HTMLParser):
    """Checks that every tag is closed, and collects what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"{tag} closes what is not open"


def long_rows() -> list[Row]:
    rows = some_rows()
    for number, row in enumerate(rows):
        row["overrides"] = [*row["overrides"], f"{LONG}{number}"]
    rows[3]["error"] = "x" * 300
    return rows


def test_page_is_closed_and_fetches_nothing() -> None:
    text = to_html(some_rows())
    markup = Markup()
    markup.feed(text)
    assert markup.open == []
    assert markup.fetched == []
    assert "script" not in markup.tags
    assert not re.search(r"url\(|@import|https?://", text)
    assert markup.tags.count("svg") >= 4


def test_page_escapes_what_users_typed() -> None:
    rows = some_rows()
    rows[0]["overrides"] = ["model.path=/<script>alert(1)</script>&\"'"]
    text = to_html(rows)
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_page_without_a_measured_row_says_what_failed() -> None:
    text = to_html(some_rows()[3:])
    assert "Not measured" in text and "killed by SIGKILL" in text
    assert "<svg" not in text


@pytest.mark.parametrize(("largest", "ticks"), [(0, [0, 1]), (7, [0, 2, 4, 6, 8]), (40, [0, 10, 20, 30, 40])])
def test_ticks_are_round_and_hold_the_largest(largest: float, ticks: list[float]) -> None:
    assert nice_ticks(largest) == pytest.approx(ticks)


@pytest.mark.parametrize("largest", [1e-9, 0.0213, 0.3, 1.01, 99.0, 12345.6])
def test_ticks_of_any_size_are_few(largest: float) -> None:
    ticks = nice_ticks(largest)
    assert ticks[0] == 0 and ticks[-1] >= largest > ticks[-2]
    assert 3 <= len(ticks) <= 6


@pytest.mark.parametrize(("largest", "power"), [(1, 0), (9999, 0), (0.03, 0), (0.002, -3), (4e-7, -9), (2.5e6, 6)])
def test_numbers_along_an_axis_are_short(largest: float, power: int) -> None:
    assert power_of(largest) == power
    assert all(len(f"{tick / 10.0**power:.4g}") <= 5 for tick in nice_ticks(largest))


def tiny_differences() -> list[Row]:
    rows = some_rows()
    for found in (found for row in rows for found in row.get("quality", [])):
        found["kl"]["mean"] *= 0.07
    return rows


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if find_browser() is None:
        pytest.skip(f"no {' or '.join(NAMES)} is installed; on Debian: apt-get install chromium")
    with browsing() as found:
        yield found


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [some_rows, long_rows])
def test_page_fits_a_real_browsers_window(browser: Browser, tmp_path: Path, width: int, rows: object) -> None:
    assert callable(rows)
    page = tmp_path / "results.html"
    page.write_text(to_html(rows()), encoding="utf-8")
    tab = show(browser, page, width)
    assert tab.evaluate("innerWidth") == width
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    outside = """[...document.querySelectorAll('main *')].filter(each => {
        const box = each.getBoundingClientRect();
        return box.width > 0 && (box.right > innerWidth + 1 || box.left < -1) && !each.closest('thead');
    }).map(each => each.tagName + ' ' + each.textContent.slice(0, 40)).join('; ')"""
    assert tab.evaluate(outside) == ""
    tab.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("width", WIDTHS)
def test_plots_are_drawn_and_their_text_is_readable(browser: Browser, tmp_path: Path, width: int) -> None:
    page = tmp_path / "results.html"
    page.write_text(to_html(some_rows()), encoding="utf-8")
    tab = show(browser, page, width)
    plots = tab.evaluate("[...document.querySelectorAll('.plot')].map(each => each.getBoundingClientRect().width)")
    assert len(plots) == 4 and min(plots) > 300
    smallest = "Math.min(...[...document.querySelectorAll('.plot text')].map(t => t.getBoundingClientRect().height))"
    assert tab.evaluate(smallest) >= 10
    assert tab.evaluate("getComputedStyle(document.querySelector('.m.s0')).fill") == "rgb(11, 99, 196)"


@pytest.mark.parametrize("rows", [some_rows, tiny_differences])
def test_no_number_of_an_axis_lies_on_its_name(browser: Browser, tmp_path: Path, rows: object) -> None:
    assert callable(rows)
    page = tmp_path / "results.html"
    page.write_text(to_html(rows()), encoding="utf-8")
    tab = show(browser, page, 390)
    covered = """[...document.querySelectorAll('.plot')].flatMap(plot => {
        const box = each => each.getBoundingClientRect();
        const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
        const ticks = [...plot.querySelectorAll('.tick:not(.halo)')];
        return [...plot.querySelectorAll('.name')].flatMap(name => ticks
            .filter(tick => meet(box(name), box(tick)))
            .map(tick => tick.textContent + ' on ' + name.textContent));
    }).join('; ')"""
    assert tab.evaluate(covered) == ""


def test_dark_page_for_who_asks_for_one(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "results.html"
    page.write_text(to_html(some_rows()), encoding="utf-8")
    tab = show(browser, page, 1280, dark=True)
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 23, 31)"
