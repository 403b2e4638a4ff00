"""Tests of what `watch` prints: as a user starts it, in a terminal and without one."""

import os
import pty
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from tests.conftest import ROOT, clean_environment
from tests.trainer.watch.fake_run import FakeRun
from trainer.paths import STUDY_FILE
from trainer.watch.run import WatchedRun
from trainer.watch.terminal import curve, make_table


def command(*runs: Path) -> list[str]:
    return [sys.executable, "-m", "trainer", "watch", *map(str, runs)]


@contextmanager
def started(*runs: Path, output: int, **variables: str) -> "Iterator[subprocess.Popen[str]]":
    environment = clean_environment() | variables
    with subprocess.Popen(command(*runs), cwd=ROOT, env=environment, stdout=output, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_without_a_terminal_each_epoch_of_each_run_is_a_line(tmp_path: Path) -> None:
    first, second = FakeRun(tmp_path / "first"), FakeRun(tmp_path / "study" / "second")
    (tmp_path / "study" / STUDY_FILE).touch()
    first.end_epoch(1)
    with ExitStack() as stack:
        with first.training(), second.training():
            process = stack.enter_context(started(first.path, tmp_path / "study", output=subprocess.PIPE))
            assert process.stdout is not None
            figures = "loss 0.1000, accuracy 10.00 %; validation loss 0.1000, accuracy 10.00 %"
            assert process.stdout.readline() == f"first: epoch 1/3; {figures}\n"
            second.write("step", 50, 2, loss=0.5, accuracy=0.25, images_per_second=1234.5, num_steps=135)
            assert (
                process.stdout.readline() == "second: step 50 of 135; loss 0.5000, accuracy 25.00 %; 1,234 images/s\n"
            )
            first.finish()
            assert process.stdout.readline() == "first: finished, test 99.00 %\n"
            second.fail("rank 1 was killed")
        assert process.stdout.readline() == "second: failed at step 50: rank 1 was killed\n"
        assert process.wait(timeout=60) == 1


def test_in_a_terminal_a_table_follows_the_runs_and_stays(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "mnist-run")
    ours, theirs = pty.openpty()
    shown = ""

    def read_until(text: str) -> None:
        nonlocal shown
        while text not in shown:
            assert select.select([ours], [], [], 60)[0], shown
            try:
                shown += os.read(ours, 4096).decode()
            except OSError:  # the process has ended
                assert text == "END", shown
                return

    with ExitStack() as stack:
        with run.training():
            process = stack.enter_context(started(run.path, output=theirs, TERM="xterm", COLUMNS="130"))
            os.close(theirs)
            read_until("mnist-run")
            for epoch in (1, 2, 3):
                run.end_epoch(epoch)
            read_until("30.00 %")
            run.finish()
        read_until("END")
        os.close(ours)
        assert process.wait(timeout=60) == 0
    last = shown.rpartition("validation")[2]
    for text in ("3/3", "▁▅█", "finished, test 99.00 %"):
        assert text in last


def test_what_is_no_run_is_one_line_and_help_tells_the_verb(tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path / "x"), cwd=ROOT, env=clean_environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "does not exist (yet)" in done.stderr


@pytest.mark.parametrize("width", [50, 80, 200])
def test_the_table_fits_the_terminal(tmp_path: Path, width: int) -> None:
    written = FakeRun(tmp_path / "mnist-fast-20261126T221000Z-s0", epochs=100)
    written.end_epoch(12)
    run = WatchedRun.open(written.path)
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(make_table([run], width))
    console.file.close()
    text = console.export_text()
    assert "120.00 %" in text
    assert "12/100" in text
    assert ("images/s" in text) == (width >= 120)


def test_a_curve_is_as_wide_as_its_values_up_to_twelve() -> None:
    assert curve([1.0]) == curve([]) == ""
    assert curve([2.0, float("nan"), 1.0]) == "█▁"
    assert curve([1.0, 1.0]) == "▁▁"
    assert len(curve(list(range(1000)))) == 12
    assert curve(list(range(1000)))[0] == "▁"
