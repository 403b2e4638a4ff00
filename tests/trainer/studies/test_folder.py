"""Tests of a study's folder on a full disk and with damaged files: one clear error, and no partial file."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tests.conftest import files_of_at_most, fill
from trainer.errors import CheckpointError
from trainer.studies.folder import StudyFolder
from trainer.studies.page import CaptionedFigure, Page, write_page


def test_a_result_that_does_not_fit_leaves_earlier_ones(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path, "capacity")
    folder.add_result("a", 1)
    with files_of_at_most(30), pytest.raises(CheckpointError, match=r"cannot write .*/results\.jsonl: File too large"):
        folder.add_result("b", 2)
    assert folder.results() == {"a": 1}
    folder.add_result("b", 2)
    assert folder.results() == {"a": 1, "b": 2}


def test_damaged_results_are_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("not json\n")
    with pytest.raises(CheckpointError, match=r"results\.jsonl is damaged"):
        StudyFolder(tmp_path, "capacity").results()


def draw_nothing(*, narrow: bool) -> Figure:
    return Figure()


def test_a_page_on_a_full_disk_is_one_clear_error(small_disk: Path) -> None:
    machine = {"device": "an abacus", "cpus": 1, "torch": "2"}
    description = {"study": "capacity", "asked": {}, "git_commit": None, "world_size": 1, "machine": machine}
    (small_disk / "study.json").write_text(json.dumps(description))
    page = Page(
        title="A page",
        findings=["none"],
        figures=[CaptionedFigure(name="empty", title="Empty", caption="Nothing.", draw=draw_nothing)],
        tables=[],
        result={},
    )
    filler = fill(small_disk)
    with pytest.raises(CheckpointError, match=r"cannot write .*/disk: No space left on device"):
        write_page(StudyFolder(small_disk, "capacity"), page)
    filler.unlink()
    assert write_page(StudyFolder(small_disk, "capacity"), page).exists()
