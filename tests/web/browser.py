"""A real Chromium for tests: Debian's, driven by Playwright."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
PATIENCE_S = 60
"""For what a page shows in the end."""
ARGUMENTS = ("--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
"""Chromium's sandbox does not work for root in a container. A fake camera shows a green picture."""


def chromium() -> str:
    """Returns Chromium's path; installs Debian's package if it is not there."""
    if shutil.which("chromium") is None:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium", "fonts-dejavu-core"]):
            subprocess.run(["apt-get", *command], check=True, capture_output=True, env=environment, timeout=300)
    path = shutil.which("chromium")
    assert path is not None
    return path


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Context with a browser without a window."""
    expect.set_options(timeout=1000 * PATIENCE_S)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(ARGUMENTS))
        yield browser
        browser.close()


def open_section(page: Page, port: int, hash_of_section: str) -> None:
    """Opens a section of a server's page, and waits until it is there."""
    page.set_default_timeout(1000 * PATIENCE_S)
    page.goto("about:blank")
    page.goto(f"http://127.0.0.1:{port}/#{hash_of_section}")
    name = hash_of_section.partition("?")[0]
    page.wait_for_selector(f"html[data-ready={name}]", state="attached")


def draw(page: Page, strokes: list[list[tuple[float, float]]]) -> None:
    """Draws with the mouse on the sheet, whose sides are 1."""
    sheet = page.locator("canvas.pad")
    sheet.scroll_into_view_if_needed()
    box = sheet.bounding_box()
    assert box is not None
    for stroke in strokes:
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke]
        page.mouse.move(*places[0])
        page.mouse.down()
        for place in places[1:]:
            page.mouse.move(*place, steps=4)
        page.mouse.up()


LOW_CONTRAST = """() => {
    const parse = (text) => {
        const numbers = text.match(/[\\d.]+/g).map(Number);
        const scale = text.startsWith("color(") ? 255 : 1;
        return [...numbers.slice(0, 3).map((value) => scale * value), numbers[3] ?? 1];
    };
    const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
    const light = (color) => [0.2126, 0.7152, 0.0722].reduce((sum, part, i) => {
        const value = color[i] / 255;
        return sum + part * (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    }, 0);
    const parents = (element) => element ? [element, ...parents(element.parentElement)] : [];
    const found = new Set();
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const element = texts.currentNode.parentElement;
        const style = getComputedStyle(element);
        if (!texts.currentNode.textContent.trim() || !element.getClientRects().length) continue;
        const above = parents(element);
        const ground = above.map((each) => parse(getComputedStyle(each).backgroundColor))
            .reduceRight((below, top) => over(top, below), [255, 255, 255, 1]);
        const opacity = above.reduce((product, each) => product * Number(getComputedStyle(each).opacity), 1);
        const ink = parse(element instanceof SVGElement ? style.fill : style.color);
        const both = [light(over([...ink.slice(0, 3), ink[3] * opacity], ground)), light(ground)];
        const ratio = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
        if (ratio < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5))
            found.add(`${ratio.toFixed(2)}: ${texts.currentNode.textContent.trim().slice(0, 40)}`);
    }
    return [...found];
}"""
"""Returns the texts of a page whose contrast is below level AA of the WCAG."""

ONE = [[(0.5, 0.15), (0.5, 0.85)]]
SEVEN = [[(0.25, 0.2), (0.75, 0.2), (0.45, 0.85)]]


@contextmanager
def open_page(browser: Browser, expected: str) -> Iterator[Page]:
    """Context with a page that may use the clipboard. Errors, refused scripts and refused styles fail the test.

    Args:
        expected: pattern of the errors that do not.
    """
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    problems = watch_errors(page)
    yield page
    context.close()
    assert [problem for problem in problems if not re.search(expected, problem)] == []


def watch_errors(page: Page) -> list[str]:
    """Returns a list that takes each error of the page's scripts, and what its policy refuses."""
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    return problems
