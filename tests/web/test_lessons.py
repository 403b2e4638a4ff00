"""The sections Learn and Lecture in a real Chromium, with a real training service and run folders."""

import shutil
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, Page, ViewportSize, expect

from tests.conftest import ROOT
from tests.trainer.service.service_process import Service, spec
from tests.trainer.watch.fake_run import FakeRun
from tests.web.browser import open_section, watch_errors
from tests.web.conftest import watched
from trainer.records.mistakes import Mistake, write_mistakes
from trainer.service.json_values import spec_json
from trainer.studies.page_data import make_data

pytestmark = pytest.mark.installs

PHONE: ViewportSize = {"width": 390, "height": 844}
HOSTILE = "<img src=x onerror=alert(1)>"
TRAINING = """
import json, pathlib, signal, sys, time
run = pathlib.Path(sys.argv[1])
run.mkdir(parents=True, exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with (run / "metrics.jsonl").open("w") as file:
    for epoch in (1, 2, 3):
        line = {"kind": "epoch", "step": 10 * epoch, "epoch": epoch, "time": time.time(), "train_loss": 1 / epoch,
                "train_accuracy": 0.5, "val_loss": 1.5 / epoch, "val_accuracy": 0.25 * epoch}
        file.write(json.dumps(line) + "\\n")
time.sleep(600)
"""


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page whose errors, refused scripts and refused styles fail the test."""
    page = browser.new_page()
    problems = watch_errors(page)
    yield page
    page.close()
    assert problems == []


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeRun]:
    """A run that goes on."""
    run = FakeRun(tmp_path_factory.mktemp("runs") / "running")
    for epoch in (1, 2):
        run.end_epoch(epoch)
    pixels = np.full((4, 4), 200, np.uint8)
    write_mistakes(run.path, 1, [Mistake(pixels=pixels, label="3", predicted="8", confidence=0.9)])
    write_mistakes(run.path, 2, [Mistake(pixels=pixels, label=HOSTILE, predicted="9", confidence=0.7)] * 2)
    with run.training():
        yield run


@pytest.fixture(scope="module")
def port(running: FakeRun) -> Iterator[int]:
    """The port of the page of two runs, one of which is finished."""
    finished = FakeRun(running.path.with_name("finished"))
    for epoch in (1, 2, 3):
        finished.end_epoch(epoch)
    finished.finish()
    with watched(finished.path, running.path) as (port, _):
        yield port


class TestLearn:
    def test_a_run_is_followed_and_a_test_figure_is_shown_at_the_end_only(
        self, page: Page, port: int, running: FakeRun
    ) -> None:
        open_section(page, port, "learn?run=1&run=2")
        row = page.get_by_role("row").filter(has=page.get_by_label("Show running"))
        expect(row).to_contain_text("20.00 %")
        expect(row).to_contain_text("epoch 2 of 3")
        running.write("result", 90, 2, val_accuracy=0.2, test_accuracy=0.77)  # written, but the run is not finished
        running.write("step", 100, 3, loss=0.5, accuracy=0.5, images_per_second=1000, num_steps=135)
        expect(page.get_by_label("Images a second by step")).to_be_visible()
        expect(page.get_by_text("running: 1,000")).to_be_attached()
        expect(row).not_to_contain_text("77")
        finished = page.get_by_role("row").filter(has=page.get_by_label("Show finished"))
        expect(finished).to_contain_text("99.00 %")
        expect(page.get_by_role("button", name="Cancel")).to_have_count(0)  # nothing to cancel with
        curves = page.get_by_label("Loss by step").locator("path.curve")
        expect(curves).to_have_count(4)
        page.get_by_label("Show validation").uncheck()
        expect(curves).to_have_count(2)
        page.get_by_label("Show finished").uncheck()
        expect(curves).to_have_count(1)

    def test_mistakes_of_each_epoch_are_a_gallery_of_text_and_pixels(self, page: Page, port: int) -> None:
        open_section(page, port, "learn?run=2")
        tiles = page.locator(".mistakes li")
        expect(tiles).to_have_count(2)
        expect(tiles.first).to_contain_text(f"{HOSTILE} → 9")
        assert page.locator(".mistakes img").count() == 0
        page.get_by_role("slider", name="Epoch").press("ArrowLeft")
        expect(tiles).to_have_count(1)
        expect(tiles.first).to_contain_text("3 → 8")
        first_pixel = "canvas => [...canvas.getContext('2d').getImageData(0, 0, 1, 1).data]"
        assert tiles.first.locator("canvas").evaluate(first_pixel) == [200, 200, 200, 255]

    def test_a_job_is_cancelled_and_resumed(self, page: Page, tmp_path: Path) -> None:
        service = Service(tmp_path / "jobs.db")
        try:
            with httpx.Client(base_url=f"http://{service.http}") as api:
                job = api.post("/v1/jobs", json={"spec": spec_json(spec(tmp_path, TRAINING))}).json()
                open_section(page, int(service.http.rpartition(":")[2]), "learn")
                row = page.get_by_role("row").filter(has=page.get_by_label("Show 1", exact=True))
                expect(row).to_contain_text("75.00 %", timeout=60_000)
                page.get_by_role("button", name="Cancel 1").click()
                expect(row).to_contain_text("cancelled", timeout=60_000)
                page.get_by_role("button", name="Resume 1").click()
                expect(row).to_contain_text("running", timeout=60_000)
                api.post(f"/v1/jobs/{job['id']}/cancel", json={"now": True})
                expect(row).to_contain_text("cancelled", timeout=60_000)
        finally:
            service.kill()

    @pytest.mark.parametrize(("num_windows", "num_runs"), [(2, 6), (5, 2)])
    def test_windows_follow_more_runs_than_a_browser_has_connections(
        self, browser: Browser, num_windows: int, num_runs: int, tmp_path: Path
    ) -> None:
        runs = [FakeRun(tmp_path / f"run-{number}") for number in range(num_runs)]
        with ExitStack() as stack:
            for run in runs:
                run.end_epoch(1)
                stack.enter_context(run.training())
            port = stack.enter_context(watched(*(run.path for run in runs)))[0]
            context = browser.new_context()
            windows = [context.new_page() for _ in range(num_windows)]
            for page in windows:
                open_section(page, port, "learn")
                for run in runs[:2]:
                    page.get_by_label(f"Show {run.path.name}").check()
            runs[0].end_epoch(2)
            for page in windows:
                expect(page.get_by_label("Loss by step").locator("path.curve")).to_have_count(2 * num_runs)
                expect(page.get_by_role("row").filter(has=page.get_by_label("Show run-0"))).to_contain_text("20.00 %")
            shutil.rmtree(runs[1].path)  # the others stay
            for page in windows:
                expect(page.get_by_label("Loss by step").locator("path.curve")).to_have_count(2 * num_runs - 2)
            context.close()


class TestLecture:
    def test_degree_and_noise_move_the_polynomial_and_its_errors(self, page: Page, port: int) -> None:
        open_section(page, port, "lecture")
        degree = page.get_by_role("slider", name="Degree")
        degree.focus()
        for _ in range(9):
            page.keyboard.press("ArrowRight")
        expect(page.locator("p[aria-live]", has_text="Degree 9:")).to_contain_text("Over-fitting")
        for _ in range(9):
            page.keyboard.press("ArrowLeft")
        expect(page.locator("p[aria-live]", has_text="Degree 0:")).to_contain_text("Under-fitting")
        noise = page.get_by_role("slider", name="Noise")
        noise.fill("0")
        degree.fill("9")
        errors = page.locator("p[aria-live]", has_text="Degree 9:").text_content() or ""
        assert float(errors.split()[2]) < 1e-3  # nine degrees of freedom and no noise

    def test_sgd_walks_to_the_line_of_least_squares(self, page: Page, port: int) -> None:
        page.clock.install()
        open_section(page, port, "lecture")
        expect(page.get_by_text("Least squares: 0.811 mmHg a year.")).to_be_visible()
        page.get_by_role("button", name="One step").click()
        expect(page.get_by_text("Step 1: SGD")).to_be_visible()
        page.get_by_role("button", name="Play").click()
        page.clock.run_for(60_000)
        expect(page.get_by_text("Step 360: SGD 0.8")).to_be_visible()
        expect(page.get_by_role("button", name="Play")).to_be_visible()

    def test_the_histogram_fills_to_what_was_measured(self, page: Page, port: int) -> None:
        errors = make_data(ROOT / "benchmarks" / "results")["seeds"]
        figures = f"{max(errors):.2f}{statistics.median(errors):.2f}{min(errors):.2f}"
        page.clock.install()
        open_section(page, port, "lecture")
        row = page.get_by_role("row").filter(has_text="runs here")
        expect(row).to_contain_text(f"{len(errors)} runs here{figures}")
        bars = page.locator(".chart", has=page.get_by_label("Runs by test error")).locator("p")
        counts = [int(bar.partition(": ")[2]) for bar in (bars.text_content() or "").split(", ")]
        assert sum(counts) == len(errors)  # no run lies outside
        page.get_by_role("button", name="Empty it").click()
        expect(row).to_contain_text("0 runs here–––")
        page.get_by_role("button", name="Fill it").click()
        page.clock.run_for(60_000)
        expect(row).to_contain_text(f"{len(errors)} runs here{figures}")
        page.get_by_role("button", name="Fill it").click()
        expect(row).not_to_contain_text(str(len(errors)))  # it fills anew

    def test_between_whole_numbers_an_axis_has_no_numbers(self, page: Page, port: int) -> None:
        open_section(page, port, "lecture")
        numbers = page.evaluate("""async () => {
            const { lineChart } = await import("/web/charts.js");
            const chart = lineChart({ label: "one step" });
            chart.set([{ name: "images/s", x: [50], y: [2] }]);
            return [...chart.root.querySelectorAll("svg text")].map((text) => text.textContent);
        }""")
        assert sorted(numbers) == ["2", "50"]

    @pytest.mark.parametrize("name", ["learn", "lecture"])
    def test_sections_fit_a_phone_in_the_dark(self, browser: Browser, port: int, name: str) -> None:
        context = browser.new_context(viewport=PHONE, has_touch=True, is_mobile=True, color_scheme="dark")
        page = context.new_page()
        open_section(page, port, name)
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        context.close()
