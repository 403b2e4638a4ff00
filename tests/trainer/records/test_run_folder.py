"""A run's folder: which run it holds, and who may use it."""

import datetime
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import pytest
import torch

from tests.conftest import before_listing
from trainer.config import TrainConfig
from trainer.data import Dataset
from trainer.errors import CheckpointError, ConfigError
from trainer.paths import STUDY_FILE
from trainer.ranks.world import World
from trainer.recipes import RECIPES, Precision, Recipe
from trainer.records.run_folder import RunFolder, in_use
from trainer.studies.folder import StudyFolder
from trainer.studies.sweep import SweepConfig

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), num_threads=1)
RECIPE = replace(RECIPES["mnist"], dataset="mnist-mini")


def enter(config: TrainConfig, recipe: Recipe, dataset: Dataset, world: World) -> RunFolder:
    folder = RunFolder.plan(config, recipe, dataset, world)
    folder.enter(config.resume, world)
    return folder


def test_the_default_name_has_recipe_time_and_seed(
    mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = enter(TrainConfig(seed=7), RECIPE, mini, ALONE)
    assert folder.path.parent == Path("runs")
    assert folder.path.match("mnist-????????T??????Z-s7")
    assert folder.ledger_path == tmp_path / "runs" / "ledger.jsonl"
    assert RunFolder.read(folder.path).fingerprint.seed == 7


def test_runs_and_studies_that_begin_in_the_same_second_get_a_folder_each(
    mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Self:
            return cls(2026, 11, 26, 12, tzinfo=tz)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trainer.records.run_folder.datetime", SimpleNamespace(datetime=Clock, UTC=datetime.UTC))
    first, second = (RunFolder.plan(TrainConfig(epochs=epochs), RECIPE, mini, ALONE) for epochs in (1, 2))
    assert first.path.name == "mnist-20261126T120000Z-s0"
    assert second.path.name == "mnist-20261126T120000Z-s0-2"
    enter(TrainConfig(run_dir=first.path), RECIPE, mini, ALONE)
    for name in ("study-sweep-20261126T120000Z", "study-sweep-20261126T120000Z-2"):
        with StudyFolder.open("sweep", SweepConfig(), ALONE) as folder:
            assert folder.path == Path("runs") / name


def test_a_run_that_fails_before_it_begins_leaves_no_folder(
    mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with World.join("cpu") as world:
        failed = RunFolder.plan(TrainConfig(), RECIPE, mini, world)
        begun = enter(TrainConfig(), RECIPE, mini, world)
        given = RunFolder.plan(TrainConfig(run_dir=tmp_path / "given"), RECIPE, mini, world)
        assert failed.path.is_dir()
        assert not given.path.exists()
    assert not failed.path.exists()
    assert begun.config_path.exists()


def test_the_same_run_may_enter_again(mini: Dataset, tmp_path: Path) -> None:
    config = TrainConfig(run_dir=tmp_path / "run")
    first = enter(config, RECIPE, mini, ALONE)
    before = first.config_path.read_text()
    assert enter(config, RECIPE, mini, ALONE) == first
    assert first.config_path.read_text() == before
    assert not first.is_complete(ALONE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": replace(RECIPE, epochs=3)}, "recipe.epochs is 10, not 3"),
        ({"recipe": replace(RECIPE, global_batch_size=7)}, "recipe.global_batch_size is 100, not 7"),
        ({"config": {"seed": 1}}, "seed is 0, not 1"),
        ({"recipe": replace(RECIPE, name="other", epochs=3), "config": {"seed": 1}}, "recipe.name is mnist, not other"),
        ({"config": {"resume": "never"}}, "--resume never"),
    ],
)
def test_another_run_may_not_enter(change: dict, message: str, mini: Dataset, tmp_path: Path) -> None:  # type: ignore[type-arg]
    config = TrainConfig(run_dir=tmp_path / "run")
    enter(config, RECIPE, mini, ALONE)
    with pytest.raises(ConfigError, match=message):
        enter(replace(config, **change.get("config", {})), change.get("recipe", RECIPE), mini, ALONE)


def test_a_folder_of_images_that_has_changed_is_told_but_not_where_an_option_has(mini: Dataset, tmp_path: Path) -> None:
    config = TrainConfig(run_dir=tmp_path / "run")
    photos, changed = replace(RECIPE, dataset="folder:/photos"), replace(mini, sha256="e" * 64)
    enter(config, photos, mini, ALONE)
    with pytest.raises(ConfigError, match="images have been added, changed or removed since"):
        enter(config, photos, changed, ALONE)
    with pytest.raises(ConfigError, match=r"recipe\.square is the default, not pad"):
        enter(config, replace(photos, square="pad"), changed, ALONE)


@pytest.mark.parametrize(
    ("begun", "here", "remedy"),
    [
        ("float32", "bfloat16", "continue with --precision float32$"),
        ("tf32", "float32", "continue with --precision tf32 on a GPU that has it, or start anew with float32$"),
        ("float32", "tf32", "continue with --precision float32$"),
        ("bfloat16", "float32", "on the same kind of machine, or start anew with float32$"),
    ],
)
def test_a_run_does_not_change_its_precision_on_another_machine(
    begun: Precision, here: Precision, remedy: str, mini: Dataset, tmp_path: Path
) -> None:
    config = TrainConfig(run_dir=tmp_path / "run")
    enter(config, replace(RECIPE, precision=begun), mini, ALONE)
    with pytest.raises(
        ConfigError, match=f"computes in {begun}, and this command, .*, would compute in {here}: .*{remedy}"
    ):
        enter(config, replace(RECIPE, precision=here), mini, ALONE)
    (tmp_path / STUDY_FILE).touch()  # a study has no --precision
    with pytest.raises(
        ConfigError, match=r"continue the study on the same kind of machine, or choose another --run-dir$"
    ):
        enter(config, replace(RECIPE, precision=here), mini, ALONE)


def test_a_run_keeps_the_rounding_of_its_gradients(mini: Dataset, tmp_path: Path) -> None:
    """Other ways to add up gradients may change: they round as another number of ranks does."""
    rounded = TrainConfig(run_dir=tmp_path / "rounded", gradient_reduction="ddp-bfloat16")
    enter(rounded, RECIPE, mini, ALONE)
    with pytest.raises(ConfigError, match="adds up gradients in bfloat16: continue with --gradient-reduction ddp-bf"):
        enter(replace(rounded, gradient_reduction="ddp"), RECIPE, mini, ALONE)
    exact = TrainConfig(run_dir=tmp_path / "exact", gradient_reduction="ddp")
    enter(exact, RECIPE, mini, ALONE)
    enter(replace(exact, gradient_reduction="vector"), RECIPE, mini, ALONE)
    with pytest.raises(ConfigError, match="adds up gradients in float32: continue without --gradient-reduction ddp-bf"):
        enter(replace(exact, gradient_reduction="ddp-bfloat16"), RECIPE, mini, ALONE)


def test_a_folder_with_other_files_is_refused(mini: Dataset, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    folder = RunFolder.plan(TrainConfig(run_dir=tmp_path), RECIPE, mini, ALONE)
    for use in (folder.check, folder.enter):
        with pytest.raises(ConfigError, match="not empty and holds no run"):
            use("auto", ALONE)


def test_the_files_of_a_run_that_just_began_are_its_own(
    mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder.plan(TrainConfig(run_dir=tmp_path), RECIPE, mini, ALONE)
    before_listing(monkeypatch, lambda: folder.write_config(ALONE))
    folder.check("auto", ALONE)


def test_check_creates_no_folder(mini: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "run", tmp_path / "file" / "run"):
        folder = RunFolder.plan(TrainConfig(run_dir=path), RECIPE, mini, ALONE)
        folder.check("never", ALONE)
        assert not folder.is_complete(ALONE)
        assert not path.exists()
    folder = RunFolder.plan(TrainConfig(run_dir=tmp_path / "file"), RECIPE, mini, ALONE)
    with pytest.raises(CheckpointError, match=r"cannot write .*: Not a directory"):
        folder.check("auto", ALONE)


def test_a_folder_without_a_complete_config_may_be_entered(mini: Dataset, tmp_path: Path) -> None:
    """A run was killed while it wrote `config.json`, or ended because its ranks differed."""
    folder = RunFolder.plan(TrainConfig(run_dir=tmp_path / "run"), RECIPE, mini, ALONE)
    place = folder.create_for_failure()
    assert place == folder.path
    (place / "failure.json").write_text("{}")
    (place / ".config.json.4242.tmp").write_text('{"fingerp')
    folder.enter("auto", ALONE)
    assert RunFolder.read(folder.path).fingerprint == folder.fingerprint


def test_a_second_process_waits_for_the_folder_and_then_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.records.run_folder.LOCK_TIMEOUT_S", 0.1)
    printed: list[str] = []
    is_in_use = f"{tmp_path} is in use by another process: "
    with in_use(tmp_path, ALONE, printed.append):
        assert printed == []
        with (
            pytest.raises(ConfigError, match=f"^--run-dir {is_in_use}stop that process"),
            in_use(tmp_path, ALONE, printed.append),
        ):
            pass
    assert printed == [f"{is_in_use}waiting up to 0 s for it to leave"]
    with in_use(tmp_path, ALONE, printed.append):
        assert len(printed) == 1


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    for name in (".report.html.7.tmp", "figures/.curves.svg.7.tmp", ".notes.tmp"):
        (tmp_path / name).write_text("half")
    with in_use(tmp_path, ALONE, pytest.fail):
        left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == [".in-use", ".notes.tmp", "figures"]


def test_no_failure_is_written_into_a_folder_of_other_files(mini: Dataset, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    for path in (tmp_path, tmp_path / "thesis.tex" / "run"):
        assert RunFolder.plan(TrainConfig(run_dir=path), RECIPE, mini, ALONE).create_for_failure() is None


def test_damaged_files_are_named(mini: Dataset, tmp_path: Path) -> None:
    config = TrainConfig(run_dir=tmp_path / "run")
    folder = enter(config, RECIPE, mini, ALONE)
    folder.result_path.write_text("{")
    with pytest.raises(CheckpointError, match=r"result\.json is damaged"):
        folder.result()
    folder.config_path.write_text(json.dumps({})[:-1])
    with pytest.raises(CheckpointError, match=r"config\.json"):
        RunFolder.read(folder.path)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        enter(config, RECIPE, mini, ALONE)
    for path, what in (("nowhere", "does not exist"), ("run/config.json", "is a file"), ("", "holds no run")):
        with pytest.raises(ConfigError, match=f"{what}: a run's folder has a config.json"):
            RunFolder.read(tmp_path / path)
    with (
        pytest.raises(CheckpointError, match=r"cannot write .*config\.json: a file is there"),
        in_use(folder.config_path, ALONE, print),
    ):
        pass


def test_the_settings_are_kept_once_and_know_the_models_name(mini: Dataset, tmp_path: Path) -> None:
    config = TrainConfig(run_dir=tmp_path / "run", name="mine", save_every_s=5.0)
    folder = enter(config, RECIPE, mini, ALONE)
    assert folder.model_name == "mnist"  # a run of version 0.1 has no run.toml
    folder.keep_settings(config, RECIPE)
    folder.keep_settings(replace(config, name="other"), RECIPE)
    assert RunFolder.read(folder.path).model_name == "mine"
    images = RunFolder(tmp_path / "other", folder.fingerprint.with_dataset("folder:/data/my photos"))
    assert images.model_name == "my-photos"
