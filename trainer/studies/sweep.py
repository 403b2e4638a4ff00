"""A small grid or random search over a recipe's fields (pages 54 to 57 of the lecture: tuning, without cheating).

Candidates are trained and validated on a data set without its test images, so that no test image can influence the
choice. The test accuracy of the best one is known only after a training run of its own.
"""

import json
import shlex
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from convoy.allocator import keep_freed_memory
from convoy.named_files import read_regular
from convoy.options import option
from trainer.data import without_test_images
from trainer.errors import ConfigError, DivergenceError, reading, writing
from trainer.evaluation.evaluate import evaluate
from trainer.files import write_json
from trainer.paths import default_data_dir
from trainer.progress import Progress
from trainer.ranks.world import World
from trainer.signals import StopRequest
from trainer.studies.folder import StudyFolder
from trainer.studies.page import write_page
from trainer.studies.search_space import (
    Candidate,
    apply_candidate,
    as_options,
    describe_candidate,
    make_candidates,
    without_rates,
)
from trainer.studies.sweep_page import make_page
from trainer.studies.trials import (
    TrainedTrial,
    Trial,
    TrialContext,
    TrialOptions,
    build_trial,
    check_known,
    describe_left,
    describe_plan,
    explain_interruption,
    train_trials,
    wait_for_trials,
)

_GRID = "lr_scale=0.25,0.5,1,2"


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepConfig(TrialOptions):
    """Trains a recipe with each combination of --grid's values, and ranks them by validation accuracy.

    Each is a whole training: without options four, of the recipe mnist with four learning rates. Ranks share them.
    """

    grid: Annotated[tuple[str, ...], option("FIELD=VALUE,VALUE ...", _GRID)] = (_GRID,)
    """Values to try, all combinations: fields of `convoy recipes NAME`, lr_scale, lists: 'widths=[8,16],[16,32]'."""
    random: int = 0
    """Try this many of the grid's combinations, drawn at random; 0: all of them."""
    seeds: int = 1
    """Train each candidate from this many seeds, and rank by the mean."""
    run_dir: Annotated[Path | None, option("PATH", "runs/study-sweep-TIME")] = None
    """Folder of this study; an existing one is continued."""


def study_sweep(config: SweepConfig) -> None:
    """Runs `python -m trainer study sweep`.

    Raises:
        TrainerError: see `trainer.errors`.
    """
    if config.seeds < 1 or config.random < 0 or config.stack < 0:
        raise ConfigError("--seeds must be at least 1, --random and --stack must not be negative")
    keep_freed_memory()
    with (
        StopRequest() as stop,
        World.join(config.device) as world,
        Progress(is_main=world.is_main, stop=stop) as progress,
    ):
        own = config.training()
        base = replace(own, set=config.set).resolve()
        if base.num_validation == 0:
            raise ConfigError(f"{base.name} has num_validation 0: a sweep ranks its candidates by validation images")
        config = replace(config, dataset=config.dataset and base.dataset)
        candidates = make_candidates(config.grid, config.random)
        recipes = [apply_candidate(own.resolve(), candidate, config.set) for candidate in candidates]
        seeds = f", from {config.seeds} seeds each" if config.seeds > 1 else ""
        details = f"{' '.join(config.grid)}{seeds}, ranked by validation images; --grid asks for other values"
        progress.log(describe_plan(recipes, config.seeds, details))
        dataset = without_test_images(config.load(base, world, progress.log))
        context = TrialContext(world=world, dataset=dataset, image_size=config.image_size, progress=progress, stop=stop)
        # A network that takes no such images would end the sweep after hours. Learning rates change no network.
        different = zip(map(without_rates, candidates), recipes, strict=True)
        for recipe in {json.dumps(values): recipe for values, recipe in different}.values():
            build_trial(context, Trial(recipe, 0, Path("candidate")), will_train=False)
        with StudyFolder.open("sweep", config, world) as folder, explain_interruption(folder):
            progress.log(f"study folder {folder.path}")
            trials = [
                Trial(recipe, seed, folder.path / f"candidate-{number}-s{seed}")
                for number, recipe in enumerate(recipes)
                for seed in range(config.seeds)
            ]
            check_known(context, trials)
            candidate_of = {trial.path: candidates[at // config.seeds] for at, trial in enumerate(trials)}
            _train(trials[world.rank :: world.size], candidate_of, config.stack, context, folder)
            wait_for_trials(world, list(candidate_of), lambda trial: _result_path(trial).exists())
            if world.is_main:
                results = [_read_result(trial.path, at // config.seeds) for at, trial in enumerate(trials)]
                if all(result["diverged"] for result in results):
                    raise DivergenceError(f"all {len(candidates)} candidates diverged; try lower learning rates")
                page = make_page(base, candidates, results, partial(training_command, config))
                if page.result["command"]:
                    print(f"to train with the best values: {page.result['command']}")
                write_page(folder, page)


def training_command(config: SweepConfig, candidate: Candidate) -> str:
    """Returns the command of a training run with a candidate's values."""
    options = {
        "recipe": config.recipe,
        "dataset": config.dataset,
        "image-size": config.image_size,
        "skip-bad-images": config.skip_bad_images or None,
        "network": config.network,
        "weights": config.weights,
        "epochs": config.epochs,
        "data-dir": None if config.data_dir == default_data_dir() else config.data_dir,
    }
    options = {name: value for name, value in options.items() if value is not None and name not in candidate}
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return shlex.join(["convoy", "train", *given, *as_options(candidate, config.set)])


def _train(
    trials: list[Trial], candidate_of: dict[Path, Candidate], most: int, context: TrialContext, folder: StudyFolder
) -> None:
    """Trains and validates those of this rank's trials that have no result yet.

    Args:
        candidate_of: by the trial's path.
        most: trials that are trained side by side, 0 to choose.
    """
    todo = [trial for trial in trials if not _result_path(trial.path).exists()]
    if len(todo) < len(trials):
        print(f"{len(trials) - len(todo)} of {len(trials)} trainings are done already", flush=True)
    began = time.monotonic()
    for num_done, trained in enumerate(train_trials(context, todo, folder, most=most), start=1):
        outcome = _record(trained, candidate_of[trained.trial.path], context)
        print(f"{outcome}; {describe_left(began, num_done, len(todo))}", flush=True)


def _record(trained: TrainedTrial, candidate: Candidate, context: TrialContext) -> str:
    """Validates a trained candidate and writes its result, which it returns in words."""
    trial = trained.trial
    result: dict[str, Any] = {"seed": trial.seed, "values": candidate}
    try:
        run = trained.run
        found = evaluate(run.learner.predict, run.validation_images, run.validation_indices, context.single_rank)
        result |= {"diverged": False, "val_accuracy": found.accuracy, "val_loss": found.loss}
        outcome = f"validation accuracy {100 * found.accuracy:.2f} %"
    except DivergenceError as error:
        result |= {"diverged": True, "val_accuracy": None, "val_loss": None}
        outcome = str(error)
    with writing(_result_path(trial.path)):
        write_json(_result_path(trial.path), result | {"train_seconds": trained.seconds})
    return f"{describe_candidate(candidate)}, seed {trial.seed}: {outcome}"


def _read_result(trial: Path, number: int) -> dict[str, Any]:
    path = _result_path(trial)
    with reading(path):
        result: dict[str, Any] = {"number": number, "diverged": False, **json.loads(read_regular(path))}
    return result


def _result_path(trial: Path) -> Path:
    return trial / "candidate.json"
