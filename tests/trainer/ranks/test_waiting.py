"""Tests that a wait is logged after a few seconds, and then less and less often."""

import re
import time

import pytest

from trainer.ranks import waiting
from trainer.ranks.waiting import announced, name_numbers


def lines_of(
    descriptions: list[str], wait_s: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Waits, with each description in turn, and returns the lines; an empty description is not logged."""
    monkeypatch.setattr(waiting, "FIRST_S", 0.05)
    left = list(descriptions)
    with announced(lambda: left.pop(0) if len(left) > 1 else left[0]):
        time.sleep(wait_s)
    time.sleep(0.05)
    return capsys.readouterr().err.splitlines()


def test_the_intervals_grow(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = lines_of(["rank 0 waits for rank 1"], 0.5, capsys, monkeypatch)  # at 0.05, 0.15 and 0.35 s
    assert 1 <= len(lines) <= 3
    assert all(re.fullmatch(r"rank 0 waits for rank 1 \(0 s so far\)", line) for line in lines)


def test_a_short_wait_is_not_logged(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_of(["rank 0 waits"], 0.0, capsys, monkeypatch) == []


def test_one_process_logs_the_wait_of_all(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_of([""], 0.3, capsys, monkeypatch) == []
    assert lines_of(["", "rank 1 waits for rank 0"], 0.4, capsys, monkeypatch)[0].startswith(
        "rank 1 waits for rank 0 ("
    )


def test_a_store_that_does_not_answer_does_not_end_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def describe() -> str:
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(waiting, "FIRST_S", 0.01)
    with announced(describe):
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([3], "rank 3"), ([1, 2], "ranks 1, 2"), ([1, 4, 5, 6], "ranks 1, 4 to 6"), (range(1, 1024), "ranks 1 to 1023")],
)
def test_many_ranks_are_named_in_few_words(numbers: list[int], text: str) -> None:
    assert name_numbers("rank", numbers) == text
