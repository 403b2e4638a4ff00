"""Tests of the page of watched runs: the command as a user starts it, called over HTTP."""

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.conftest import ROOT, clean_environment
from tests.trainer.watch.fake_run import FakeRun
from trainer.errors import ConfigError
from trainer.records.mistakes import Mistake, write_mistakes
from trainer.watch.command import WatchConfig, watch_runs
from trainer.watch.run import WatchedRun
from trainer.watch.server import RunList


@contextmanager
def watched(*runs: Path) -> Iterator[str]:
    """Starts the page of runs; yields its address."""
    command = [sys.executable, "-m", "trainer", "watch", *map(str, runs), "--web", "--port", "0"]
    with subprocess.Popen(
        command, cwd=ROOT, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            found = re.match(r"http://127\.0\.0\.1:\d+", first)
            assert found, first
            yield found[0]
            process.terminate()
            assert process.stdout.read() == ""
        finally:
            process.kill()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[FakeRun, FakeRun]:
    folder = tmp_path_factory.mktemp("runs")
    return FakeRun(folder / "first"), FakeRun(folder / "second")


@pytest.fixture(scope="module")
def http(runs: tuple[FakeRun, FakeRun]) -> Iterator[httpx.Client]:
    first, second = runs
    first.end_epoch(1)
    second.end_epoch(1)
    second.finish()
    write_mistakes(
        second.path, 1, [Mistake(pixels=np.zeros((2, 2), np.uint8), label="1", predicted="7", confidence=0.5)]
    )
    with first.training(), ExitStack() as stack:
        client = stack.enter_context(httpx.Client())
        with watched(first.path, second.path) as address:
            client.base_url = httpx.URL(address)
            stack.enter_context(client.stream("GET", "/v1/jobs/1/events"))  # still open when the command ends
            yield client


def test_runs_are_listed_as_the_service_lists_jobs(http: httpx.Client) -> None:
    second, first = http.get("/v1/jobs").json()["jobs"]
    assert [first[name] for name in ("id", "name", "state", "epoch", "num_epochs")] == [1, "first", "RUNNING", 1, 3]
    assert (second["state"], second["figures"]["test_accuracy"]) == ("SUCCEEDED", 0.99)
    assert http.get("/v1/jobs/2").json() == second
    assert http.get("/v1/jobs/3").json() == {"error": "no run 3"}


def test_events_follow_a_run_and_go_on_after_the_last_one_known(
    http: httpx.Client, runs: tuple[FakeRun, FakeRun]
) -> None:
    assert http.head("/v1/jobs/1/events").headers["content-type"].startswith("text/event-stream")
    with http.stream("GET", "/v1/jobs/1/events", timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
        assert json.loads(next(lines))["line"]["epoch"] == 1
        assert json.loads(next(lines))["state"] == "RUNNING"
        runs[0].end_epoch(2)
        event = json.loads(next(lines))
        assert (event["number"], event["kind"], event["line"]["val_accuracy"]) == (2, "progress", 0.2)
    with http.stream("GET", "/v1/jobs/2/events", headers={"last-event-id": "1"}) as response:
        kinds = [line.removeprefix("event: ") for line in response.iter_lines() if line.startswith("event: ")]
    assert kinds == ["progress", "state"]
    assert http.get("/v1/jobs/2/events?after=3").status_code == 204


def test_mistakes_and_the_page_are_there(http: httpx.Client) -> None:
    (epoch,) = http.get("/v1/jobs/2/mistakes").json()["epochs"]
    assert [one["predicted"] for one in epoch["mistakes"]] == ["7"]
    assert http.get("/v1/jobs/1/mistakes").json() == {"epochs": []}
    assert "<title>" in http.get("/").text
    assert http.get("/web/page.json").json()["options"]["learn"] == {"api": "/v1/jobs", "can_change": False}


def test_unchanged_metrics_are_not_read_again_and_runs_without_a_folder_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = FakeRun(tmp_path / "first"), FakeRun(tmp_path / "second")
    for run in (first, second):
        run.end_epoch(1)
    opened: list[Path] = []
    read = WatchedRun.open
    monkeypatch.setattr(WatchedRun, "open", lambda path: opened.append(path) or read(path))  # type: ignore[func-returns-value]
    listing = RunList([first.path, second.path])

    def states() -> list[tuple[int, str, int]]:
        return [(job["id"], job["state"], job["epoch"]) for job in listing.jobs()]

    assert states() == states() == [(2, "CANCELLED", 1), (1, "CANCELLED", 1)]
    second.fail("no space")  # which changes no metrics
    first.end_epoch(2)
    assert states() == [(2, "FAILED", 1), (1, "CANCELLED", 2)]
    assert opened == [first.path, second.path, first.path]
    shutil.rmtree(first.path)
    assert states() == [(2, "FAILED", 1)]


def test_another_name_of_this_machine_is_refused(http: httpx.Client) -> None:
    assert http.get("/v1/jobs", headers={"host": "attacker.example"}).status_code == 400
    assert http.post("/v1/jobs/1/cancel").status_code in (404, 405)


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        command = [sys.executable, "-m", "trainer", "watch", str(run.path), "--web", "--port", port]
        done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: --port {port}: the port is not available")


def test_a_port_that_cannot_exist_and_no_run_are_one_line(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"^--port 99999: must be between 0 and 65535$"):
        watch_runs(WatchConfig(runs=[run.path], web=True, port=99999))
    with pytest.raises(ConfigError, match=r"^which runs"):
        watch_runs(WatchConfig(runs=[]))
