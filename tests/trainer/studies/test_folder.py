"""Tests of a study's folder: continued on another machine, on a full disk, and with damaged files."""

import html
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from tests.conftest import before_listing, files_of_at_most, fill
from trainer.errors import CheckpointError, ConfigError
from trainer.ranks.world import World
from trainer.records.run_folder import in_use
from trainer.studies import folder
from trainer.studies.folder import StudyFolder
from trainer.studies.page import CaptionedFigure, Page, write_page

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), num_threads=1)
EMPTY = Page(title="A page", findings=["none"], figures=[], tables=[], result={})


@dataclass(frozen=True)
class Options:
    run_dir: Path
    seed: int = 0


def write_empty_study(path: Path) -> dict[str, Any]:
    """Starts or continues a study without figures; returns its `result.json`."""
    with StudyFolder.open("capacity", Options(path), ALONE) as folder:
        write_page(folder, EMPTY)
    result: dict[str, Any] = json.loads((path / "result.json").read_text())
    return result


def change_machine(path: Path, **values: str | int) -> None:
    """Changes the machine on which a study started."""
    description = json.loads((path / "study.json").read_text())
    description["machine"] |= values
    (path / "study.json").write_text(json.dumps(description))


def test_a_study_that_continues_elsewhere_names_both_machines(tmp_path: Path) -> None:
    assert "continued_on" not in write_empty_study(tmp_path)
    change_machine(tmp_path, device="an abacus")
    for _ in range(2):  # the second time, the study knows this machine
        result = write_empty_study(tmp_path)
    assert result["machine"]["device"] == "an abacus"
    (here,) = result["continued_on"]
    page = " ".join((tmp_path / "report.html").read_text().split())
    assert "On an abacus" in page
    assert f"; continued on {html.escape(here['device'])}" in page


def test_another_number_of_threads_is_the_same_machine(tmp_path: Path) -> None:
    """The number of ranks decides how many threads each has."""
    result = write_empty_study(tmp_path)
    change_machine(tmp_path, threads=result["machine"]["threads"] + 1)
    assert "continued_on" not in write_empty_study(tmp_path)


def test_other_options_are_another_study(tmp_path: Path) -> None:
    write_empty_study(tmp_path)
    with (
        pytest.raises(ConfigError, match=r"other options, --seed 0 \(you ask for --seed 1\): give the same ones"),
        StudyFolder.open("capacity", Options(tmp_path, seed=1), ALONE),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="holds the study capacity: choose another folder"),
        StudyFolder.open("zoo", Options(tmp_path), ALONE),
    ):
        pass


def test_a_study_that_another_process_begins_meanwhile_keeps_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def in_use_after_another(path: Path, world: World, log: Callable[[str], None]) -> Iterator[None]:
        monkeypatch.undo()
        write_empty_study(path)
        with in_use(path, world, log):
            yield

    monkeypatch.setattr(folder, "in_use", in_use_after_another)
    with (
        pytest.raises(ConfigError, match=r"other options, --seed 0 \(you ask for --seed 1\): give the same ones"),
        StudyFolder.open("capacity", Options(tmp_path, seed=1), ALONE),
    ):
        pass
    write_empty_study(tmp_path)


def test_the_files_of_a_study_that_just_began_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before_listing(monkeypatch, lambda: write_empty_study(tmp_path))
    write_empty_study(tmp_path)


@pytest.mark.parametrize(
    ("value", "option"),
    [
        (3, "--num-seeds 3"),
        (None, "no --num-seeds"),
        (False, "--no-num-seeds"),
        (["a=1", "b=2"], "--num-seeds a=1 b=2"),
    ],
)
def test_an_option_is_named_as_it_is_given(value: Any, option: str) -> None:
    assert folder._option("num_seeds", value) == option


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
    for content in ("", "[]", "{}", '{"study": "capacity", "asked": [], "machine": {}}'):
        (tmp_path / "study.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"study\.json is damaged"):
            StudyFolder(tmp_path, "capacity").description()


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
    write_page(StudyFolder(small_disk, "capacity"), page)
    assert (small_disk / "report.html").exists()
