"""Tests that a long export shows what it does, and a short one stays silent."""

import pytest

from trainer.export import stages
from trainer.export.stages import show_stages


def test_a_line_is_shown_at_most_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((100.0, 100.1, 104.9, 105.0, 109.9, 200.0, 201.0))
    monkeypatch.setattr(stages, "monotonic", lambda: next(times))
    lines: list[str] = []
    show = show_stages(lines.append)
    for line in "abcdef":
        show(line)
    assert lines == ["c", "e"]
