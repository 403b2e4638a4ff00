"""Draws digits on the page in a real Chromium, and measures how long each answer takes.

    python benchmarks/page.py [--model models/mnist/1]

An answer is everything between the end of a stroke and new bars: the drawing as a PNG, its preparation by the server,
and the inference of the prepared pixels. Server, browser and benchmark share this machine. Writes
`benchmarks/results/page-DATE.md`.
"""

import argparse
import datetime
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.serving.server_process import ServerProcess  # noqa: E402
from tests.web.browser import ONE, SEVEN, draw, open_browser, open_section  # noqa: E402

NUM_DRAWINGS = 100


def measure(port: int) -> list[float]:
    """Returns the milliseconds of each answer."""
    with open_browser() as browser:
        page = browser.new_page()
        open_section(page, port, "try")
        for number in range(NUM_DRAWINGS + 5):
            draw(page, ONE if number % 2 else SEVEN)
            page.locator(".headline strong").wait_for()
            page.get_by_role("button", name="Clear").click()
        times: list[float] = page.evaluate("performance.getEntriesByName('answer').map(entry => entry.duration)")
        return times[5:]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "mnist" / "1", help="a version's folder")
    source = parser.parse_args().model
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "mnist"
        shutil.copytree(source, folder / "1")
        for name in ("config.pbtxt", "labels.txt"):
            shutil.copy(source.parent / name, folder)
        server = ServerProcess("--model-repository", scratch)
        try:
            times = measure(server.http_port())
        finally:
            server.close()
    median, slow, slowest = np.percentile(times, (50, 95, 100))
    today = datetime.date.today().isoformat()
    lines = [
        f"# An answer to a drawing, {today}",
        "",
        f"`python benchmarks/page.py`: {len(times)} answers, in Chromium without a window, on {platform.machine()} "
        f"with {os.cpu_count()} cores (load average at the end: {os.getloadavg()[0]:.1f}).",
        "",
        "| median | 95th percentile | slowest |",
        "|---|---|---|",
        f"| {median:.1f} ms | {slow:.1f} ms | {slowest:.1f} ms |",
        "",
    ]
    print("\n".join(lines))
    (ROOT / "benchmarks" / "results" / f"page-{today}.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
