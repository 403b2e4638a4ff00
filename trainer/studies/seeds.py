"""One recipe from many seeds (page 53 of the lecture: "running 100 times our experiment on MNIST").

Each seed is a whole run, evaluated on the test set once, which the workspace's ledger records. The page shows all of
them, together with the runs of the same setting that were evaluated outside the study.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from trainer.config import DeviceChoice, TrainConfig
from trainer.data import Dataset
from trainer.errors import ConfigError, DivergenceError, writing
from trainer.evaluation.ledger import Ledger
from trainer.files import write_json
from trainer.hardware import keep_freed_memory
from trainer.loop.run import Run
from trainer.paths import default_data_dir
from trainer.prepare import load
from trainer.progress import Progress
from trainer.ranks.world import World
from trainer.recipes import Recipe
from trainer.records.checkpoint import Checkpoints
from trainer.records.result import Result
from trainer.records.run_folder import RunFolder
from trainer.signals import StopRequest
from trainer.studies.folder import StudyFolder
from trainer.studies.page import write_page
from trainer.studies.seeds_page import SeedResults, make_page
from trainer.studies.stacked import can_stack, measure_throughput, train_stacked
from trainer.studies.trials import TrialContext, explain_interruption, open_trial, train_trial
from trainer.train import evaluate_on_test_set, summarize

_STACK_SIZES = (1, 2, 4, 8, 16, 32)
_MIN_SPEEDUP = 1.1
"""Stacking is used only if it is this much faster: smaller differences may be noise."""
_MEASURE_S = 4.0
"""About how long each stack size is measured."""
_MAX_LISTED = 200
"""Characters of seeds in the name of a folder, which file systems limit to 255 bytes."""
_PROBE_STEPS = 3
"""Steps from which the number of steps to measure is estimated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedsConfig:
    """Runs one recipe from many seeds; reports worst, median and best with intervals. The ranks share the seeds."""

    recipe: str = "mnist"
    """The recipe; `convoy recipes` lists them all."""
    runs: int = 100
    """Number of seeds, counted from --first-seed."""
    first_seed: int = 0
    """The first seed."""
    dataset: str | None = None
    """Data set instead of the recipe's, as for a training run."""
    image_size: int | None = None
    """For folder:PATH only: size in pixels to which images are resized (the shorter side) and cropped to a square."""
    epochs: int | None = None
    """Number of epochs, instead of the recipe's."""
    stack: int = 0
    """Seeds trained together as one network; 1: one after another; 0: measure and use the fastest."""
    data_dir: Path = field(default_factory=default_data_dir)
    """Folder in which data sets are kept."""
    run_dir: Path | None = None
    """Folder of this study; an existing one is continued. [default: runs/study-seeds-TIME]"""
    device: DeviceChoice = "auto"
    """auto uses the GPUs if there are any, one for each rank."""


def study_seeds(config: SeedsConfig) -> None:
    """Runs `python -m trainer study seeds`.

    Raises:
        TrainerError: see `trainer.errors`.
    """
    if config.runs < 1 or config.stack < 0 or config.first_seed < 0:
        raise ConfigError("--runs must be at least 1, --stack and --first-seed must not be negative")
    keep_freed_memory()
    with StopRequest() as stop, World.join(config.device) as world, Progress(is_main=world.is_main) as progress:
        recipe = TrainConfig(recipe=config.recipe, dataset=config.dataset, epochs=config.epochs).resolve()
        config = replace(config, dataset=config.dataset and recipe.dataset)
        if config.stack > 1 and not can_stack(recipe):
            raise ConfigError(f"--stack {config.stack}: {recipe.name} uses Muon, which cannot train stacked seeds")
        # Seeds that are trained together need their images in memory.
        dataset = load(recipe, config.image_size, config.data_dir, world, progress.log, source="resident")
        context = TrialContext(
            world=world, dataset=dataset, image_size=config.image_size, progress=Progress(is_main=False), stop=stop
        )
        with StudyFolder.open("seeds", config, config.run_dir, world) as folder, explain_interruption(folder):
            rates = world.broadcast_object(_measure_stacks(config, recipe, context, folder) if world.is_main else {})
            seeds = list(range(config.first_seed, config.first_seed + config.runs))
            _train_all(seeds[world.rank :: world.size], _best_stack(rates), recipe, context, folder)
            if world.is_main:
                results = _collect_results(seeds, folder)
                print(f"report: {write_page(folder, make_page(recipe, results, rates))}")


def _measure_stacks(
    config: SeedsConfig, recipe: Recipe, context: TrialContext, folder: StudyFolder
) -> dict[int, float]:
    """Returns images per second by stack size, measured once per study.

    The rate is 0 where there is no choice: `--stack` was given, or seeds cannot be stacked.
    """
    if config.stack or config.runs == 1 or not can_stack(recipe):
        return {config.stack or 1: 0.0}
    known = folder.results().get("rates")
    if known is None:
        known = {}
        for size in (size for size in _STACK_SIZES if size <= config.runs):
            runs = [
                open_trial(context, recipe, seed, folder.path / "measured" / f"seed-{seed}") for seed in range(size)
            ]
            if runs[0].steps_per_epoch < _PROBE_STEPS:  # so few images are not worth measuring
                return {1: 0.0}
            estimate = measure_throughput(runs, _PROBE_STEPS)
            num_steps = max(_PROBE_STEPS, int(estimate * _MEASURE_S / (size * recipe.global_batch_size)))
            known[str(size)] = measure_throughput(runs, min(num_steps, runs[0].steps_per_epoch))
            print(f"{size} seed{'s' if size > 1 else ''} at once: {known[str(size)]:,.0f} images/s", flush=True)
            if known[str(size)] < 0.7 * max(known.values()):
                break  # larger stacks are slower still
        folder.add_result("rates", known)
    return {int(size): rate for size, rate in known.items()}


def _best_stack(rates: dict[int, float]) -> int:
    best = max(rates, key=lambda size: rates[size])
    return best if 1 not in rates or rates[best] >= _MIN_SPEEDUP * rates[1] else 1


def _train_all(seeds: list[int], stack: int, recipe: Recipe, context: TrialContext, folder: StudyFolder) -> None:
    """Trains and evaluates those of this rank's seeds that have no result yet."""
    todo = [seed for seed in seeds if not _is_done(folder, seed)]
    began = time.monotonic()
    if len(todo) < len(seeds):
        print(f"{len(seeds) - len(todo)} of {len(seeds)} seeds are done already", flush=True)
    for start in range(0, len(todo), stack):
        group = todo[start : start + stack]
        for run, num_stacked in _train_group(group, recipe, context, folder):
            result = _evaluate_seed(run, context.dataset, num_stacked)
            number = start + group.index(run.seed) + 1
            left = (time.monotonic() - began) / (start + len(group)) * (len(todo) - start - len(group))
            print(
                f"seed {run.seed}: test error {100 * (1 - result.test_accuracy):.2f} %, "
                f"{result.train_seconds:.1f} s; {number} of {len(todo)}, {left / 60:.0f} min left",
                flush=True,
            )


def _train_group(
    group: list[int], recipe: Recipe, context: TrialContext, folder: StudyFolder
) -> Iterator[tuple[Run, int]]:
    """Trains a group of seeds to the end, stacked where possible.

    A seed that was partly trained before continues alone. A seed that diverges is recorded and left out.

    Yields:
        A run, and the number of seeds that it was trained with, itself included.
    """
    stacked = _train_stacked(group, recipe, context, folder) if len(group) > 1 else {}
    for seed in group:
        if seed in stacked:
            yield stacked[seed], len(stacked)
        elif (run := _train_alone(seed, recipe, context, folder)) is not None:
            yield run, 1


def _train_stacked(group: list[int], recipe: Recipe, context: TrialContext, folder: StudyFolder) -> dict[int, Run]:
    """Trains the untrained seeds of a group together; returns their runs by seed, or none if they diverge."""
    runs = [open_trial(context, recipe, seed, _trial_path(folder, seed)) for seed in group]
    untrained = {run.seed: run for run in runs if run.state.step == 0}
    if len(untrained) < 2:
        return {}
    checkpoints = Checkpoints(folder.path / _stack_name(list(untrained)), print)
    try:
        train_stacked(list(untrained.values()), checkpoints)
    except DivergenceError as error:
        print(f"{error}; the seeds {', '.join(map(str, untrained))} are trained one after another", flush=True)
        return {}
    return untrained


def _stack_name(seeds: list[int]) -> str:
    """Returns the name of the folder with the checkpoints of these seeds; with a digest if their list is too long."""
    listed = "-".join(map(str, seeds))
    if len(listed) > _MAX_LISTED:
        listed = f"{seeds[0]}-to-{seeds[-1]}-{hashlib.sha256(listed.encode()).hexdigest()[:12]}"
    return f"stack-{listed}"


def _train_alone(seed: int, recipe: Recipe, context: TrialContext, folder: StudyFolder) -> Run | None:
    try:
        return train_trial(context, recipe, seed, _trial_path(folder, seed))
    except DivergenceError as error:
        print(f"seed {seed}: {error}", flush=True)
        path = _diverged_path(folder, seed)
        with writing(path):
            write_json(path, {"seed": seed, "error": str(error)})
        return None


def _evaluate_seed(run: Run, dataset: Dataset, num_stacked: int) -> Result:
    """Validates, evaluates on the test set once and writes the seed's result."""
    validation = run.learner.evaluate(run.validation_images, run.validation_indices, run.world)
    _, test, recorded = evaluate_on_test_set(run, dataset)
    assert recorded is not None
    # The accuracies of all seeds would be incomplete here; the study's page has them.
    result = replace(summarize(run, validation, test, recorded), test_accuracy_of_seeds=None, stacked=num_stacked)
    with writing(run.folder.result_path):
        result.write(run.folder.result_path)
    return result


def _collect_results(seeds: list[int], folder: StudyFolder) -> SeedResults:
    """Waits for all seeds and returns every result of the setting: those in the folder, and others in the ledger.

    Polls for the seeds of other ranks, because a collective would time out.
    """
    while not all(_is_done(folder, seed) for seed in seeds):
        time.sleep(0.5)
    trials = [RunFolder.read(path.parent) for path in folder.path.glob("seed-*/result.json")]
    results = [result for trial in trials if (result := trial.result()) is not None]
    diverged = [json.loads(path.read_text())["seed"] for path in folder.path.glob("seed-*/diverged.json")]
    if not results:
        raise DivergenceError(f"all {len(diverged)} seeds diverged and there is no result; try lower learning rates")
    known = {result.weights_sha256 for result in results}
    ledger = Ledger(trials[0].ledger_path)
    entries = [
        entry
        for setting in {trial.fingerprint.setting_sha256 for trial in trials}
        for entry in ledger.of_setting(setting)
    ]
    return SeedResults(
        results=sorted(results, key=lambda result: result.seed),
        diverged=sorted(diverged),
        others=[entry for entry in entries if entry.weights_sha256 not in known],
        num_evaluations=len(ledger.entries(results[0].dataset_sha256)),
    )


def _trial_path(folder: StudyFolder, seed: int) -> Path:
    return folder.path / f"seed-{seed}"


def _result_path(folder: StudyFolder, seed: int) -> Path:
    return _trial_path(folder, seed) / "result.json"


def _diverged_path(folder: StudyFolder, seed: int) -> Path:
    return _trial_path(folder, seed) / "diverged.json"


def _is_done(folder: StudyFolder, seed: int) -> bool:
    return _result_path(folder, seed).exists() or _diverged_path(folder, seed).exists()
