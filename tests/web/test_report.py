"""A run's report in a real Chromium: on a phone in the dark, with names in any script."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.trainer.report.test_page import report, some_mistakes
from tests.web.browser import LOW_CONTRAST, open_page
from tests.web.models import HOSTILE, RIGHT_TO_LEFT

pytestmark = pytest.mark.installs

PHONE_WIDTH = 360
WIDE = "W" * 200
FAMILY = "\U0001f468\u200d\U0001f467"
ORDER = """() => {
    const name = [...document.querySelectorAll("td bdi")].find((one) => /[\u0590-\u05ff]/.test(one.textContent));
    const [box, behind] = [name, name.nextElementSibling].map((one) => one.getBoundingClientRect());
    return box.right <= behind.left || box.bottom <= behind.top;
}"""
"""Returns whether the count of a mistake stands behind its class, whose name is written from right to left."""


@pytest.mark.parametrize("num_classes", [4, 40])  # a matrix, and pairs
def test_a_report_can_be_read(browser: Browser, tmp_path: Path, num_classes: int) -> None:
    names = (WIDE, RIGHT_TO_LEFT, HOSTILE, FAMILY, RIGHT_TO_LEFT, WIDE, FAMILY, HOSTILE)
    classes = tuple(f"{names[number % 8]}{number}" for number in range(num_classes))
    report(tmp_path / "run", classes, some_mistakes(num_classes, 10 * num_classes))
    with open_page(browser, "^$") as page:
        page.emulate_media(color_scheme="dark")
        page.set_viewport_size({"width": PHONE_WIDTH, "height": 800})
        page.goto((tmp_path / "run/report.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE_WIDTH
        assert page.evaluate(LOW_CONTRAST) == []
        assert page.evaluate(ORDER)
        assert "\ufffd" not in page.locator("main").inner_text()
        widest = "tables => Math.max(...tables.map((table) => table.offsetWidth))"
        assert page.locator("table.wide").evaluate_all(widest) < 900
