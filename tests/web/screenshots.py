"""Makes the page's pictures in the README and in docs/ from running servers, so that they show what there is.

    python -m tests.web.screenshots docs/images --runs runs/mnist-* --model-repository models

The sections of training come from `convoy watch RUN… --web`, those of inference from `convoy serve`. Without runs or
models their pictures are left as they are. The browser is Debian's Chromium, driven by Playwright.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from playwright.sync_api import Browser

from convoy.options import option
from tests.web.browser import open_browser, open_section

SETTLE_MS = 4_000
"""Between a section's start and its picture: streams bring their first events, drawings their answers."""
WIDTH, HEIGHT, PHONE_WIDTH = 1280, 860, 390
TRAINING = ("learn", "lecture")
INFERENCE = ("try?demo=4", "inside?demo=4", "serve")
Scheme = Literal["light", "dark"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Makes the pictures."""

    folder: Annotated[Path, tyro.conf.Positional, option("FOLDER")]
    """Where the pictures are written, as page-SECTION.png."""
    runs: Annotated[tuple[Path, ...], option("RUN ...", "none")] = ()
    """Run folders that the section Learn shows."""
    model_repository: Annotated[Path | None, option("PATH", "none")] = None
    """The models of the sections Try, Inside and Serve."""
    everything: bool = False
    """Also dark and on a phone, to look at."""


def main(config: Config) -> None:
    config.folder.mkdir(parents=True, exist_ok=True)
    with open_browser() as browser:
        if config.runs:
            command = ["trainer", "watch", *map(str, config.runs), "--web", "--port", "0"]
            with _started(command, r"http://127\.0\.0\.1:(\d+)") as port:
                _photograph(browser, port, TRAINING, config)
        if config.model_repository is not None:
            ports = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
            command = ["serving", "--model-repository", str(config.model_repository), *ports]
            with _started(command, r"http[^\n]*?:(\d+)") as port:
                _photograph(browser, port, INFERENCE, config)


def _photograph(browser: Browser, port: int, sections: tuple[str, ...], config: Config) -> None:
    views: list[tuple[str, int, Scheme]] = [("", WIDTH, "light")]
    if config.everything:
        views += [("-dark", WIDTH, "dark"), ("-phone", PHONE_WIDTH, "light")]
    for section in sections:
        for suffix, width, scheme in views:
            page = browser.new_page(viewport={"width": width, "height": HEIGHT}, color_scheme=scheme)
            open_section(page, port, section)
            if section == "serve":  # has little to show without requests
                page.wait_for_timeout(SETTLE_MS)
                page.get_by_role("button", name="Send 600 requests").click()
            page.wait_for_timeout(SETTLE_MS)
            path = config.folder / f"page-{section.partition('?')[0]}{suffix}.png"
            page.screenshot(path=path, full_page=True)
            page.close()
            print(path, flush=True)


@contextmanager
def _started(command: list[str], ready: str) -> Iterator[int]:
    """Starts a server; yields the port that its output tells."""
    with subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.search(ready, line):
                    yield int(found[1])
                    break
            else:
                raise SystemExit(f"{' '.join(command)} ended before it was ready")
        finally:
            process.terminate()


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m tests.web.screenshots"))
