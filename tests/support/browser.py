"""A real browser looking at a page: the installed Chromium without a window, driven by Playwright."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from launching import LONG_S
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """The installed Chromium or Chrome, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextlib.contextmanager
def browsing() -> Iterator[Browser]:
    """A browser that is ended afterwards."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_browser(), args=["--no-sandbox"], timeout=1000 * LONG_S
        )
        yield browser
        browser.close()


def open_tab(browser: Browser, width: int = 1280, height: int = 800, dark: bool = False) -> Page:
    """An empty window of that size, which waits for whatever comes; below 500 wide it is a phone's."""
    phone = width < 500
    tab = browser.new_page(
        viewport={"width": width, "height": height},
        is_mobile=phone,
        device_scale_factor=2 if phone else 1,
        color_scheme="dark" if dark else "light",
    )
    tab.set_default_timeout(1000 * LONG_S)
    return tab


def show(browser: Browser, page: Path, width: int, height: int = 844, dark: bool = False) -> Page:
    """The page in a window of that size."""
    tab = open_tab(browser, width, height, dark)
    tab.goto(page.as_uri())
    return tab
