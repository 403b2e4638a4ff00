"""Tests that a long export logs its progress, and a short one logs nothing."""

import pytest

from trainer.export import throttle
from trainer.export.throttle import throttled


def test_a_line_is_logged_at_most_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((100.0, 100.1, 104.9, 105.0, 109.9, 200.0, 201.0))
    monkeypatch.setattr(throttle, "monotonic", lambda: next(times))
    lines: list[str] = []
    log = throttled(lines.append)
    for line in "abcdef":
        log(line)
    assert lines == ["c", "e"]
