"""The page in a real Chromium: by mouse, finger and keyboard, dark, light, printed, with hostile names and tokens."""

import functools
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, expect

from serving.server import Server
from tests.serving.conftest import serve
from tests.web.browser import DIGITS, LOW_CONTRAST, ONE, SEVEN, draw, open_page, open_section
from tests.web.conftest import config
from tests.web.models import HOSTILE, RIGHT_TO_LEFT, write_many

pytestmark = pytest.mark.installs

PHONE: ViewportSize = {"width": 390, "height": 844}


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with open_page(browser, "status of 40") as page:
        yield page


class TestTry:
    def test_each_stroke_moves_the_bars(self, page: Page, port: int) -> None:
        open_section(page, port, "try")
        expect(page.locator(".headline")).to_have_text("Draw a digit")
        draw(page, ONE)
        expect(page.locator(".headline strong")).to_have_text("1")
        page.get_by_role("button", name="Clear").click()
        expect(page.locator(".headline")).to_have_text("Draw a digit")
        draw(page, SEVEN)
        expect(page.locator(".headline strong")).to_have_text("7")
        expect(page.locator(".answers li")).to_have_count(10)
        expect(page.locator(".facts")).to_contain_text("digits version 2 ·")
        expect(page.locator(".facts")).to_contain_text(" ms")
        assert page.locator("canvas.sight").evaluate("canvas => [canvas.width, canvas.height]") == [28, 28]
        bright = (
            "canvas => Math.max(...canvas.getContext('2d').getImageData(0, 0, 28, 28).data.filter((_, i) => !(i % 4)))"
        )
        assert page.locator("canvas.sight").evaluate(bright) > 200

    def test_latency_of_a_drawing_is_printed(self, page: Page, port: int) -> None:
        open_section(page, port, "try")
        for _ in range(8):
            draw(page, ONE)
            expect(page.locator(".headline strong")).to_have_text("1")
            page.get_by_role("button", name="Clear").click()
        times = sorted(page.evaluate("performance.getEntriesByName('answer').map(entry => entry.duration)"))
        assert len(times) >= 8
        median, slow = times[len(times) // 2], times[-1 - len(times) // 20]
        print(f"a drawing is answered in {median:.0f} ms (median), {slow:.0f} ms (95th percentile)")

    def test_keyboard_draws_too(self, page: Page, port: int) -> None:
        open_section(page, port, "try")
        page.locator("canvas.pad").focus()
        page.keyboard.press("Space")
        for _ in range(18):
            page.keyboard.press("ArrowDown")
        page.keyboard.press("Space")
        expect(page.locator(".headline strong")).to_have_text("1")
        page.keyboard.press("Backspace")
        expect(page.locator(".headline")).to_have_text("Draw a digit")
        page.locator("canvas.pad").hover()
        page.mouse.down()
        page.mouse.move(200, 300, steps=3)
        page.keyboard.press("Delete")  # and what the mouse still draws is gone, too
        page.mouse.move(150, 350, steps=3)
        page.mouse.up()
        expect(page.locator(".headline")).to_have_text("Draw a digit")

    def test_finger_draws_on_a_phone_in_the_dark(self, browser: Browser, port: int) -> None:
        context = browser.new_context(viewport=PHONE, has_touch=True, is_mobile=True, color_scheme="dark")
        page = context.new_page()
        for name in ("inside?demo=4", "serve", "try"):
            open_section(page, port, name)
            assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        draw(page, ONE)
        expect(page.locator(".headline strong")).to_have_text("1")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 19, 26)"
        context.close()

    def test_pictures_are_opened_dropped_and_photographed(self, page: Page, port: int) -> None:
        open_section(page, port, "try")
        page.get_by_label("Picture", exact=True).set_input_files(DIGITS / "1.png")
        expect(page.locator(".headline strong")).to_have_text("1")
        drop = """async (url) => {
            const file = new File([await (await fetch(url)).blob()], "icon.png", { type: "image/png" });
            const transfer = new DataTransfer();
            transfer.items.add(file);
            const sheet = document.querySelector("canvas.pad");
            for (const type of ["dragover", "drop"])
                sheet.dispatchEvent(new DragEvent(type, { bubbles: true, dataTransfer: transfer }));
        }"""
        page.get_by_role("button", name="Undo").click()
        expect(page.locator(".headline")).to_have_text("Draw a digit")
        page.evaluate(drop, "/web/convoy.svg")  # an SVG is no picture for a network
        expect(page.locator("#messages p.error")).to_have_count(1)
        page.get_by_role("button", name="Camera").click()
        expect(page.locator("video.pad")).to_be_visible()
        page.get_by_role("button", name="Take").click()
        expect(page.locator(".facts")).to_contain_text("Top 3")

    def test_its_code_works(self, page: Page, port: int, tmp_path: Path) -> None:
        open_section(page, port, "try")
        draw(page, ONE)
        expect(page.locator(".headline strong")).to_have_text("1")
        page.get_by_text("Ask it from your own code").click()
        with page.expect_download() as download:
            page.get_by_role("button", name="digit.png").click()
        download.value.save_as(tmp_path / "digit.png")
        for name, shell in (("curl", ["sh", "-c"]), ("Python", [sys.executable, "-c"])):
            page.get_by_role("button", name=f"Copy as {name}").click()
            text = page.evaluate("navigator.clipboard.readText()")
            done = subprocess.run([*shell, text], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
            assert (
                done.stdout.replace("'", '"').replace(" ", "").startswith(('{"model_name":"digits"', '[{"index":1'))
            ), done

    def test_correction_is_saved_for_training(self, page: Page, port: int, saved: Path) -> None:
        open_section(page, port, "try")
        draw(page, SEVEN)
        expect(page.locator(".headline strong")).to_have_text("7")
        page.get_by_role("button", name="Save").click()
        expect(page.locator("#messages")).to_have_text("Choose what it is")
        page.get_by_label("Wrong? It is").select_option("2")
        page.get_by_role("button", name="Save").click()
        expect(page.locator("#messages")).to_contain_text("Saved as corrected/2/")
        [file] = (saved / "2").iterdir()
        assert file.read_bytes().startswith(b"\x89PNG")

    def test_a_models_name_ends_no_quotes_of_the_shell(self, page: Page, tmp_path: Path) -> None:
        write_many(tmp_path, 2)
        (tmp_path / "many").rename(tmp_path / "it's; rm -r $HOME")
        for served in serve(config(tmp_path)):
            open_section(page, served.server.http.port, "try")
            page.get_by_text("Ask it from your own code").click()
            expect(page.locator("pre").first).to_contain_text("/it%27s%3B%20rm%20-r%20%24HOME/classify")
            page.goto("about:blank")

    def test_names_are_text_and_never_html(self, page: Page, port: int) -> None:
        open_section(page, port, "try?model=strange")
        page.get_by_label("Picture", exact=True).set_input_files(DIGITS / "1.png")
        expect(page.locator(".answers")).to_contain_text(HOSTILE)
        expect(page.locator(".facts bdi").last).to_have_text(RIGHT_TO_LEFT)  # else its figure stands before it
        open_section(page, port, "serve")
        expect(page.locator("table").first).to_contain_text(HOSTILE)
        assert page.locator("main img").count() == 0
        assert page.title() == "Serve · Convoy"


class TestInside:
    def test_maps_fields_and_occlusion(self, page: Page, port: int) -> None:
        open_section(page, port, "inside?demo=7")
        expect(page.locator(".map")).to_have_count(16)
        page.locator(".maps").focus()
        before = page.get_by_text("It sees 5 × 5 pixels").inner_text()
        page.keyboard.press("ArrowLeft")
        after = page.get_by_text("It sees 5 × 5 pixels").inner_text()
        assert before != after
        page.get_by_role("button", name="3 max-pooling").click()
        expect(page.get_by_text("It sees 7 × 7 pixels")).to_be_visible()
        page.locator(".map canvas").nth(3).hover()
        expect(page.get_by_text("Map 4 of 16")).to_be_visible()
        expect(page.get_by_text("196 images of 5 × 5 hidden pixels in 7 requests")).to_be_visible()
        page.locator("canvas.occlusion").hover()
        told = page.get_by_text("With this place hidden, “7” has")
        expect(told).to_be_visible()
        page.locator("canvas.occlusion").focus()
        place = page.locator(".decides .overlay").get_attribute("style")
        page.keyboard.press("ArrowUp")
        assert page.locator(".decides .overlay").get_attribute("style") != place

    def test_a_network_without_maps_says_so(self, page: Page, port: int) -> None:
        open_section(page, port, "try?model=strange")
        page.get_by_label("Picture", exact=True).set_input_files(DIGITS / "1.png")
        expect(page.locator(".facts")).to_contain_text("Top 3")
        page.get_by_role("link", name="Inside").click()
        expect(page.get_by_text("has no convolution or pooling near its input")).to_be_visible()


class TestServe:
    def test_batches_are_drawn_and_nothing_is_watched_when_it_is_hidden(
        self, page: Page, port: int, shown: Server
    ) -> None:
        open_section(page, port, "serve")
        expect(page.get_by_text("live", exact=True)).to_be_visible()
        page.get_by_role("button", name="Send 600 requests").click()
        expect(page.locator("p[data-count]")).to_have_attribute("data-count", re.compile(r"\d{2,}"))
        expect(page.get_by_text("images a batch", exact=True).first).to_be_visible()
        expect(page.get_by_text("is damaged")).to_be_visible()
        page.get_by_label("Batches as they are made").focus()
        page.keyboard.press("ArrowLeft")
        expect(page.get_by_text(re.compile(r"digits version 2: \d+ images? of \d+ requests?, waiting"))).to_be_visible()
        expect(page.get_by_role("button", name="Send 600 requests")).to_be_enabled()
        page.get_by_label("Batches as they are made").blur()
        page.wait_for_timeout(200)  # for the last event
        page.evaluate("""() => {
            window.numTold = 0;
            new MutationObserver(() => numTold++).observe(document.querySelector("p[data-count]"), { childList: true });
        }""")
        page.set_viewport_size({"width": 900, "height": 800})
        page.wait_for_timeout(200)  # until the batches are drawn again
        assert page.evaluate("numTold") == 0  # text that is as before is not read aloud again
        batcher = shown.repository.get("digits").batcher
        assert batcher.watch is not None
        page.get_by_role("link", name="Try").click()
        for _ in range(100):
            if batcher.watch is None:
                break
            page.wait_for_timeout(100)
        assert batcher.watch is None

    def test_promotion_asks_for_a_token_that_goes_nowhere_else(
        self, page: Page, page_models: Path, tmp_path: Path
    ) -> None:
        tokens = tmp_path / "tokens"
        tokens.write_text("reader-token name=reader scopes=infer\nadmin-token name=admin scopes=infer,admin\n")
        tokens.chmod(0o600)
        urls: list[str] = []
        page.on("request", lambda request: urls.append(request.url))
        for served in serve(config(page_models, token_file=tokens, model_control_mode="poll")):
            open_section(page, served.server.http.port, "serve")
            expect(page.get_by_role("dialog")).to_contain_text("The server asks for a token.")
            page.get_by_label("Token of this server").fill("“reader-token”")
            page.keyboard.press("Enter")
            expect(page.get_by_role("dialog")).to_contain_text("The server does not accept this token.")
            page.get_by_label("Token of this server").fill("reader-token")
            page.keyboard.press("Enter")
            page.get_by_role("button", name="Promote version 1 of digits").click()
            expect(page.get_by_role("dialog")).to_contain_text("needs the scope admin")
            page.get_by_label("Token of this server").fill("admin-token")
            page.get_by_role("button", name="Use").click()
            page.get_by_role("button", name="Promote version 1 of digits").click()
            expect(page.locator("#messages")).to_contain_text("digits: promote is done")
            assert served.server.repository.get("digits").version == "1"
            page.get_by_role("button", name="Roll back to version 2").click()
            expect(page.locator("#messages")).to_contain_text("digits: rollback is done")
            assert served.server.repository.get("digits").version == "2"
            stored = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
            assert "token" not in page.evaluate(stored)
            assert not [url for url in urls if "token" in url]
            assert page.get_by_label("Token of this server").input_value() == ""
            page.goto("about:blank")
        (page_models / "digits" / "serving.json").unlink()


class TestEverywhere:
    @pytest.mark.parametrize("section", ["try", "inside?demo=4", "serve"])
    def test_controls_have_names_and_keys_reach_them(self, page: Page, port: int, section: str) -> None:
        open_section(page, port, section)
        nameless = """[...document.querySelectorAll('button, select, input, canvas[tabindex], a, [role=img]')]
            .filter((e) => !(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length))
            .map((e) => e.className)"""
        assert page.evaluate(nameless) == []
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        reached = set()
        for _ in range(25):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.textContent.slice(0, 40)"))
        assert {"Try", "Inside", "Serve"} <= reached
        assert page.locator("h1").count() == 1

    def test_the_header_covers_no_focus_and_the_skip_link_leaves_the_section(self, page: Page, port: int) -> None:
        open_section(page, port, "serve")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        page.set_viewport_size({"width": 640, "height": 360})
        covered = """(() => {
            const header = document.querySelector("header");
            const focused = document.activeElement;
            const [box, above] = [focused.getBoundingClientRect(), header.getBoundingClientRect()];
            return !header.contains(focused) && focused.className !== "skip"
                && box.bottom > 0 && box.bottom <= above.bottom ? focused.textContent : null;
        })()"""
        for _ in range(20):
            page.keyboard.press("Shift+Tab")
            assert page.evaluate(covered) is None
        page.reload()  # at #main
        expect(page.get_by_role("region", name="Try")).to_be_visible()

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_text_can_be_read_and_nothing_moves_for_who_wants_that(
        self, page: Page, port: int, scheme: Literal["light", "dark"]
    ) -> None:
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        for section in ("try?demo=4", "inside?demo=4", "serve", "lecture"):
            open_section(page, port, section)
            assert page.evaluate(LOW_CONTRAST) == []
        moving = "[...document.querySelectorAll('*')].filter((e) => getComputedStyle(e).transitionDuration !== '0s')"
        assert page.evaluate(f"{moving}.length") == 0

    def test_print_leaves_out_what_paper_cannot_do(self, page: Page, port: int) -> None:
        open_section(page, port, "try?demo=1")
        page.emulate_media(media="print", color_scheme="dark")
        assert not page.get_by_role("navigation").is_visible()
        assert not page.get_by_role("button", name="Clear").is_visible()
        assert page.locator(".answers").is_visible()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
        assert len(page.pdf()) > 10_000

    def test_policy_refuses_foreign_code(self, browser: Browser, port: int) -> None:
        page = browser.new_page()
        open_section(page, port, "try")
        tried = """() => {
            try { document.body.innerHTML = '<b>x</b>'; return 'html'; } catch (error) { return error.name; }
        }"""
        assert page.evaluate(tried) == "TypeError"
        outside = "fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => error.name)"
        assert page.evaluate(outside) == "TypeError"
        page.close()


class TestOtherPages:
    """Pages of other origins, which `--cors-origin` lets call the API."""

    @pytest.fixture
    def other(self, tmp_path: Path) -> Iterator[str]:
        """The origin of a site with an empty page."""
        (tmp_path / "index.html").write_text("<!doctype html><title>shop</title>")
        handler = functools.partial(_Quiet, directory=str(tmp_path))
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as site:
            thread = threading.Thread(target=site.serve_forever)
            thread.start()
            yield f"http://127.0.0.1:{site.server_port}"
            site.shutdown()
            thread.join()

    def test_fetch_of_an_allowed_page_works_and_of_another_does_not(
        self, page: Page, page_models: Path, other: str, shown: Server, tmp_path: Path
    ) -> None:
        tokens = tmp_path / "tokens"
        tokens.write_text("secret\n")
        tokens.chmod(0o600)
        call = """async ([url, token]) => {
            const pixels = Array(784).fill(0);
            const body = { inputs: [{ name: "images", datatype: "UINT8", shape: [1, 1, 28, 28], data: pixels }] };
            const headers = { "content-type": "application/json", ...(token && { authorization: `Bearer ${token}` }) };
            try {
                const response = await fetch(`${url}/v2/models/digits/infer`,
                    { method: "POST", headers, body: JSON.stringify(body) });
                return [response.status, (await response.json()).model_name ?? null];
            } catch (error) { return [0, error.name]; }
        }"""
        for served in serve(config(page_models, cors_origin=(other,), token_file=tokens)):
            allowed = f"http://127.0.0.1:{served.server.http.port}"
            page.goto(other)
            assert page.evaluate(call, [allowed, "secret"]) == [200, "digits"]
            assert page.evaluate(call, [allowed, ""]) == [401, None]
        assert page.context.browser is not None
        stranger = page.context.browser.new_page()
        stranger.goto(other)
        assert stranger.evaluate(call, [f"http://127.0.0.1:{shown.http.port}", ""]) == [0, "TypeError"]
        save = (
            """(url) => fetch(url, { method: "POST", mode: "no-cors", body: "x" }).then((response) => response.type)"""
        )
        folder = f"http://127.0.0.1:{shown.http.port}/web/api/models/digits/save?label=1"
        assert stranger.evaluate(save, folder) == "opaque"
        stranger.close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass
