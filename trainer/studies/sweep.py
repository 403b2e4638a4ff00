"""A small grid or random search over a recipe's fields (pages 54 to 57 of the lecture: tuning, without cheating).

Candidates are trained and validated on a data set without its test images, so that no test image can influence the
choice. The test accuracy of the best one is known only after a training run of its own.
"""

import json
import shlex
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from trainer.augmentation import check_shift
from trainer.config import DeviceChoice, TrainConfig
from trainer.data import without_test_images
from trainer.errors import ConfigError, DivergenceError, writing
from trainer.evaluation.evaluate import evaluate
from trainer.files import write_json
from trainer.hardware import keep_freed_memory
from trainer.paths import default_data_dir
from trainer.prepare import load
from trainer.progress import Progress
from trainer.ranks.world import World
from trainer.recipes import Recipe
from trainer.signals import StopRequest
from trainer.studies.folder import StudyFolder
from trainer.studies.page import write_page
from trainer.studies.search_space import (
    Candidate,
    apply_candidate,
    as_options,
    describe_candidate,
    make_candidates,
)
from trainer.studies.sweep_page import make_page
from trainer.studies.trials import TrialContext, explain_interruption, train_trial


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepConfig:
    """Tries values of a recipe's fields and ranks them by validation accuracy. The ranks share the candidates."""

    recipe: str = "mnist"
    """The recipe to change."""
    grid: tuple[str, ...] = ("lr_scale=0.25,0.5,1,2",)
    """FIELD=VALUE,VALUE…, several: a recipe's fields, as `convoy recipes NAME` shows them, and lr_scale for all its
    learning rates."""
    random: int = 0
    """Try this many of the grid's combinations, drawn at random; 0: all of them."""
    seeds: int = 1
    """Train each candidate from this many seeds, and rank by the mean."""
    dataset: str | None = None
    """Data set instead of the recipe's, as for a training run."""
    image_size: int | None = None
    """For folder:PATH only: size in pixels to which images are resized (the shorter side) and cropped to a square."""
    epochs: int | None = None
    """Number of epochs, instead of the recipe's."""
    data_dir: Path = field(default_factory=default_data_dir)
    """Folder in which data sets are kept."""
    run_dir: Path | None = None
    """Folder of this study; an existing one is continued. [default: runs/study-sweep-TIME]"""
    device: DeviceChoice = "auto"
    """auto uses the GPUs if there are any, one for each rank."""


def study_sweep(config: SweepConfig) -> None:
    """Runs `python -m trainer study sweep`.

    Raises:
        TrainerError: see `trainer.errors`.
    """
    if config.seeds < 1 or config.random < 0:
        raise ConfigError("--seeds must be at least 1, --random must not be negative")
    keep_freed_memory()
    with (
        StopRequest() as stop,
        World.join(config.device) as world,
        Progress(is_main=world.is_main, stop=stop) as progress,
    ):
        base = TrainConfig(recipe=config.recipe, dataset=config.dataset, epochs=config.epochs).resolve()
        config = replace(config, dataset=config.dataset and base.dataset)
        candidates = make_candidates(config.grid, config.random)
        recipes = [apply_candidate(base, candidate) for candidate in candidates]
        dataset = without_test_images(load(base, config.image_size, config.data_dir, world, progress.log))
        for recipe in recipes:
            check_shift(recipe.augment, dataset.train.shape[1])
        context = TrialContext(world=world, dataset=dataset, image_size=config.image_size, progress=progress, stop=stop)
        trials = [(number, seed) for number in range(len(candidates)) for seed in range(config.seeds)]
        with StudyFolder.open("sweep", config, config.run_dir, world) as folder, explain_interruption(folder):
            for number, seed in trials[world.rank :: world.size]:
                _run_trial(context, recipes[number], candidates[number], seed, _trial_path(folder, number, seed))
            if world.is_main:
                results = [_wait_for_result(folder, number, seed) for number, seed in trials]
                if all(result["diverged"] for result in results):
                    raise DivergenceError(f"all {len(candidates)} candidates diverged; try lower learning rates")
                page = make_page(base, candidates, results, partial(training_command, config))
                if page.result["command"]:
                    print(f"to train with the best values: {page.result['command']}")
                print(f"report: {write_page(folder, page)}")


def training_command(config: SweepConfig, candidate: Candidate) -> str:
    """Returns the command of a training run with a candidate's values."""
    options = {
        "recipe": config.recipe,
        "dataset": config.dataset,
        "image-size": config.image_size,
        "epochs": None if "epochs" in candidate else config.epochs,
        "data-dir": None if config.data_dir == default_data_dir() else config.data_dir,
    }
    given = [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
    return shlex.join(["convoy", "train", *given, *as_options(candidate)])


def _run_trial(context: TrialContext, recipe: Recipe, candidate: Candidate, seed: int, path: Path) -> None:
    """Trains and validates a candidate from one seed, unless it has a result."""
    if _result_path(path).exists():
        return
    began = time.monotonic()
    result: dict[str, Any] = {"seed": seed, "values": candidate, "diverged": False}
    try:
        run = train_trial(context, recipe, seed, path)
        found = evaluate(run.learner.predict, run.validation_images, run.validation_indices, context.single_rank)
        result |= {"val_accuracy": found.accuracy, "val_loss": found.loss, "train_seconds": run.state.seconds}
        outcome = f"validation accuracy {100 * found.accuracy:.2f} %"
    except DivergenceError as error:
        seconds = time.monotonic() - began
        result |= {"val_accuracy": None, "val_loss": None, "train_seconds": seconds, "diverged": True}
        outcome = str(error)
    with writing(_result_path(path)):
        write_json(_result_path(path), result)
    print(f"{describe_candidate(candidate)}, seed {seed}: {outcome}", flush=True)


def _wait_for_result(folder: StudyFolder, number: int, seed: int) -> dict[str, Any]:
    """Returns the result of a trial, as soon as the rank that trains it has written it."""
    path = _result_path(_trial_path(folder, number, seed))
    while not path.exists():
        time.sleep(0.5)
    result: dict[str, Any] = {"number": number, "diverged": False, **json.loads(path.read_text())}
    return result


def _trial_path(folder: StudyFolder, number: int, seed: int) -> Path:
    return folder.path / f"candidate-{number}-s{seed}"


def _result_path(trial: Path) -> Path:
    return trial / "candidate.json"
