"""The report page: alone in the world, correct markup, and looked at in a real browser at desktop and phone width."""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from bench_rows import some_rows
from browser import NAMES, browsing, find_browser, show
from playwright.sync_api import Browser

from kt_launch.sweeps.folder import Row
from kt_launch.sweeps.page import to_html
from kt_launch.sweeps.tables import verdict

VOID = {"meta", "br", "link", "img", "input", "hr"}
WIDTHS = (1280, 390)
LONG = "model.path=/" + "a_very_long_folder_name_without_any_break/" * 4 + "checkpoint"


Rows = Callable[[], list[Row]]


@functools.cache
def shown(rows: Rows) -> str:
    """The page of those rows."""
    return to_html(rows())


def written(rows: Rows, folder: Path) -> Path:
    """The same as a file."""
    page = folder / "results.html"
    page.write_text(shown(rows), encoding="utf-8")
    return page


class Markup(HTMLParser):
    """Checks that every tag is closed, and collects what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.links: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "srcset", "data") if tag == "a" else ("src", "href", "srcset", "data")
        self.fetched += [value or "" for name, value in attrs if name in names]
        self.links += [value for name, value in attrs if tag == "a" and name == "href"]
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
    text = shown(some_rows)
    markup = Markup()
    markup.feed(text)
    assert markup.open == []
    assert markup.fetched == []
    assert "script" not in markup.tags
    assert not re.search(r"url\((?!#)|@import|https?://", text)
    assert markup.tags.count("svg") >= 4
    assert markup.links == ["results.csv", "results.json"]
    assert len(markup.tags) > 100 and "caption" in markup.tags


def test_page_tells_on_what_and_with_what_it_was_measured_and_what_came_out() -> None:
    text = html.unescape(re.sub(r"<[^>]+>", " ", shown(some_rows)))
    for said in ("epyc-1", "sglang 0.5.23", "Python 3.11.7", "model=demo", "bench.concurrency=[1,2,4,8]"):
        assert said in text
    fastest, closest = verdict(some_rows())
    assert fastest in text and closest in text
    assert fastest.startswith("kt.method=int4 is the fastest with 561.6 tokens/s, and the smallest with 2.05 GiB")
    assert closest == ("kt.method=bf16 (KL 0) is the closest to BF16, then kt.method=int8 (KL 0.0012).")
    assert verdict(some_rows()[:1]) == []
    assert "memory of the experts, GiB" in text


def test_all_names_in_the_page_are_its_own() -> None:
    names = re.findall(r' id="([^"]+)"', shown(some_rows))
    assert {name for name in names if names.count(name) > 1 and not name.startswith("m")} == set()


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
def test_page_fits_a_real_browsers_window(browser: Browser, tmp_path: Path, width: int, rows: Rows) -> None:
    page = written(rows, tmp_path)
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
    page = written(some_rows, tmp_path)
    tab = show(browser, page, width)
    plots = tab.evaluate("[...document.querySelectorAll('.plot')].map(each => each.getBoundingClientRect().width)")
    assert len(plots) == 4 and min(plots) > 300
    smallest = "Math.min(...[...document.querySelectorAll('.plot text')].map(t => t.getBoundingClientRect().height))"
    assert tab.evaluate(smallest) >= 10
    assert (
        tab.evaluate("getComputedStyle(document.querySelector('.plot [style*=\"--s0\"]')).stroke") == "rgb(11, 99, 196)"
    )


@pytest.mark.parametrize("rows", [some_rows, tiny_differences])
def test_no_text_of_a_plot_lies_on_another(browser: Browser, tmp_path: Path, rows: Rows) -> None:
    page = written(rows, tmp_path)
    tab = show(browser, page, 390, 844)
    covered = """[...document.querySelectorAll('.plot')].flatMap(plot => {
        const box = each => each.getBoundingClientRect();
        const meet = (a, b) => a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom;
        const texts = [...plot.querySelectorAll('text')];
        return texts.flatMap((one, number) => texts.slice(number + 1)
            .filter(other => meet(box(one), box(other)))
            .map(other => other.textContent + ' on ' + one.textContent));
    }).join('; ')"""
    assert tab.evaluate("document.querySelectorAll('.plot text').length") > 40
    assert tab.evaluate(covered) == ""


def test_dark_page_for_who_asks_for_one(browser: Browser, tmp_path: Path) -> None:
    page = written(some_rows, tmp_path)
    tab = show(browser, page, 1280, dark=True)
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 23, 31)"
