"""What visitors do beside the page's buttons: files of any kind, other tabs, and servers that end and return."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from serving.server import Server
from tests.serving.conftest import serve
from tests.trainer.watch.fake_run import FakeRun
from tests.web.browser import DIGITS, ONE, draw, open_page, open_section
from tests.web.conftest import config, watched
from tests.web.models import write_many

pytestmark = pytest.mark.installs

DROP = """(given) => {
    const transfer = new DataTransfer();
    for (const [name, type, content] of given) {
        const bytes = typeof content === "number" ? new Uint8Array(content) : Uint8Array.from(content);
        transfer.items.add(new File([bytes], name, { type }));
    }
    const header = document.querySelector("header");
    for (const type of ["dragover", "drop"])
        header.dispatchEvent(new DragEvent(type, { bubbles: true, cancelable: true, dataTransfer: transfer }));
}"""
"""Drops files beside the sheet, where a browser would leave the page for a file."""
COPY_IMAGE = """async (bytes) => navigator.clipboard.write([
    new ClipboardItem({ "image/png": new Blob([Uint8Array.from(bytes)], { type: "image/png" }) })])"""
SHOW = """(isHidden) => {
    Object.defineProperty(document, "hidden", { configurable: true, get: () => isHidden });
    document.dispatchEvent(new Event("visibilitychange"));
}"""
"""A browser without a window shows all of its tabs; this tells one that it is in the background."""


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with open_page(browser, r"status of 4|net::ERR") as page:
        yield page


def file_of(name: str, kind: str = "image/png") -> list[object]:
    return [name, kind, list((DIGITS / name).read_bytes())]


class TestFiles:
    def test_an_image_is_pasted_and_text_is_not(self, page: Page, port: int) -> None:
        open_section(page, port, "try")
        page.evaluate(COPY_IMAGE, list((DIGITS / "1.png").read_bytes()))
        page.locator("canvas.pad").focus()
        page.keyboard.press("Control+V")
        expect(page.locator(".headline strong")).to_have_text("1")
        page.evaluate("navigator.clipboard.writeText('seven')")
        page.keyboard.press("Control+V")
        expect(page.locator("#messages")).to_have_text("The clipboard holds no image")
        expect(page.locator(".headline strong")).to_have_text("1")

    def test_what_cannot_be_shown_is_one_line_each(self, page: Page, port: int) -> None:
        open_section(page, port, "try")
        last = page.locator("#messages p").last
        page.evaluate(DROP, [file_of("1.png"), file_of("0.png")])
        expect(last).to_have_text("One at a time: this is 1.png, the first of 2 files")
        expect(page.locator(".headline strong")).to_have_text("1")
        for name, kind, content, line in (
            ("notes.txt", "text/plain", [104, 105], "The browser cannot read notes.txt: JPEG, PNG and WebP work"),
            ("IMG_1.HEIC", "", [*b"\0\0\0\x18ftypheic"], "The browser cannot read IMG_1.HEIC: JPEG, PNG and WebP work"),
            ("huge.png", "image/png", 70_000_000, "huge.png has 70 MB; this server takes at most 67.1 MB"),
            ("torn.png", "image/png", [137, 80, 78, 71], "The browser cannot read torn.png: JPEG, PNG and WebP work"),
        ):
            page.evaluate(DROP, [[name, kind, content]])
            expect(last).to_have_text(line)
        page.evaluate(DROP, [])
        expect(last).to_have_text("Drop the file of an image")
        expect(page.locator(".headline strong")).to_have_text("1")

    def test_a_refused_camera_is_one_line(self, page: Page, port: int) -> None:
        refuse = """(reason) => {
            navigator.mediaDevices.getUserMedia = async () => { throw new DOMException("no", reason); };
        }"""
        open_section(page, port, "try")
        for reason, line in (
            ("NotAllowedError", "The browser does not let this page use the camera"),
            ("NotFoundError", "This device has no camera"),
            ("AbortError", "The camera does not work: no"),
        ):
            page.evaluate(refuse, reason)
            page.get_by_role("button", name="Camera").click()
            expect(page.locator("#messages p").last).to_have_text(line)
        expect(page.locator("canvas.pad")).to_be_visible()

    def test_bars_of_many_classes_follow_the_likeliest_and_can_be_compared(self, page: Page, tmp_path: Path) -> None:
        write_many(tmp_path, 1000)
        for served in serve(config(tmp_path)):
            page.set_viewport_size({"width": 1024, "height": 800})
            open_section(page, served.server.http.port, "try")
            winner, first = page.locator(".headline strong"), page.locator(".answers li[data-rank='1'] .name")
            page.get_by_label("Picture", exact=True).set_input_files(DIGITS / "0.png")
            expect(page.locator(".answers li")).to_have_count(10)
            before = winner.inner_text()
            expect(first).to_have_text(before)
            page.get_by_label("Picture", exact=True).set_input_files(DIGITS / "1.png")
            expect(winner).not_to_have_text(before)
            expect(first).to_have_text(winner.inner_text())
            bars = page.locator(".answers .bar").evaluate_all(
                "bars => bars.map((bar) => bar.getBoundingClientRect()).map((box) => [box.left, box.width])"
            )
            assert len({tuple(bar) for bar in bars}) == 1
            assert bars[0][1] > 40
            page.goto("about:blank")


class TestBackground:
    """A tab in the background asks for nothing, and catches up when it is shown again."""

    def test_batches_of_the_server(self, page: Page, port: int, shown: Server) -> None:
        open_section(page, port, "serve")
        expect(page.get_by_text("live", exact=True)).to_be_visible()
        page.evaluate(SHOW, True)
        batcher = shown.repository.get("digits").batcher
        for _ in range(100):
            if batcher.watch is None:
                break
            page.wait_for_timeout(100)
        assert batcher.watch is None
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.wait_for_timeout(1500)
        assert asked == []
        page.evaluate(SHOW, False)
        expect(page.get_by_text("live", exact=True)).to_be_visible()
        page.wait_for_timeout(300)
        assert batcher.watch is not None

    def test_a_drawing_and_a_choice_stay_as_they_are(self, page: Page, port: int) -> None:
        open_section(page, port, "try?demo=4&model=digits")
        expect(page.locator(".headline strong")).to_have_text("4")
        page.get_by_role("button", name="Clear").click()
        draw(page, ONE)
        expect(page.locator(".headline strong")).to_have_text("1")
        page.get_by_label("Model").select_option("strange")
        page.evaluate(SHOW, True)
        with page.expect_response("**/strange/infer"):
            page.evaluate(SHOW, False)
        expect(page.get_by_label("Model")).to_have_value("strange")

    def test_curves_of_a_run(self, page: Page, tmp_path: Path) -> None:
        run = FakeRun(tmp_path / "running")
        run.end_epoch(1)
        with run.training(), watched(run.path) as (port, _):
            open_section(page, port, "learn")
            row = page.get_by_role("row").filter(has=page.get_by_label("Show running"))
            expect(row).to_contain_text("epoch 1 of 3")
            page.evaluate(SHOW, True)
            asked: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            run.end_epoch(2)
            page.wait_for_timeout(4500)
            assert asked == []
            expect(row).to_contain_text("epoch 1 of 3")
            page.evaluate(SHOW, False)
            expect(row).to_contain_text("epoch 2 of 3")

    def test_a_camera_that_is_allowed_too_late_stays_off(self, page: Page, port: int) -> None:
        open_section(page, port, "try")
        page.evaluate("""() => {
            const real = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
            navigator.mediaDevices.getUserMedia = async (wanted) => {
                await new Promise((resolve) => { window.allow = resolve; });
                return window.given = await real(wanted);
            };
        }""")
        page.get_by_role("button", name="Camera").click()
        page.get_by_role("link", name="Serve").click()
        page.evaluate("""async () => {
            allow();
            while (!window.given?.getTracks().every((track) => track.readyState === "ended"))
                await new Promise((resolve) => setTimeout(resolve, 50));
        }""")


class TestServersThatEnd:
    def test_a_drawing_and_figures_go_on_when_the_server_is_back(self, page: Page, page_models: Path) -> None:
        for served in serve(config(page_models)):
            port = served.server.http.port
            open_section(page, port, "serve")
            expect(page.get_by_text("live", exact=True)).to_be_visible()
        expect(page.get_by_text("not connected", exact=True)).to_be_visible()
        page.get_by_role("button", name="Promote version 1 of digits").click()
        expect(page.locator("#messages")).to_have_text("The server does not answer.")
        page.get_by_role("link", name="Try").click()
        expect(page.get_by_text("This section cannot be shown: the server does not answer.")).to_be_visible()
        for _ in serve(config(page_models, http_port=port)):
            page.get_by_role("button", name="Try again").click()
            draw(page, ONE)
            expect(page.locator(".headline strong")).to_have_text("1")
            page.get_by_role("link", name="Serve").click()
            expect(page.get_by_text("live", exact=True)).to_be_visible()
            expect(page.get_by_role("button", name="Promote version 1 of digits")).to_be_visible()
            page.goto("about:blank")

    def test_runs_are_listed_again_when_the_page_is_back(self, page: Page, tmp_path: Path) -> None:
        run = FakeRun(tmp_path / "finished")
        run.finish()
        with watched(run.path) as (port, _):
            open_section(page, port, "learn")
            expect(page.get_by_label("Show finished")).to_be_visible()
        expect(page.get_by_text("the server does not answer; trying again.")).to_be_visible()
        with watched(run.path, port=port):
            expect(page.get_by_text("the server does not answer; trying again.")).to_be_hidden()
            expect(page.locator("#messages p")).to_have_count(0)
            page.goto("about:blank")
