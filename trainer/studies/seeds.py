"""One recipe from many seeds (page 53 of the lecture: "running 100 times our experiment on MNIST").

Each seed is a whole run, evaluated on the test set once, which the workspace's ledger records. The page shows all of
them, together with the runs of the same setting that were evaluated outside the study.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from convoy.allocator import keep_freed_memory
from convoy.options import option
from trainer.data import Dataset
from trainer.errors import ConfigError, DivergenceError, writing
from trainer.evaluation.ledger import Ledger
from trainer.files import write_json
from trainer.paths import RESULT_FILE
from trainer.progress import Progress
from trainer.ranks.world import World
from trainer.records.result import Result
from trainer.records.run_folder import RunFolder
from trainer.results import evaluate_on_test_set, summarize, validate
from trainer.signals import StopRequest
from trainer.studies.folder import StudyFolder
from trainer.studies.page import write_page
from trainer.studies.seeds_page import SeedResults, make_page
from trainer.studies.trials import (
    TrainedTrial,
    Trial,
    TrialContext,
    TrialOptions,
    check_known,
    describe_left,
    describe_plan,
    explain_interruption,
    train_trials,
    wait_for_trials,
)

DIVERGED_FILE = "diverged.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedsConfig(TrialOptions):
    """Runs one recipe from many seeds; reports worst, median and best with intervals. The ranks share the seeds."""

    runs: int = 100
    """Number of seeds, counted from --first-seed. Each is a whole training, one after another on CPUs."""
    first_seed: int = 0
    """The first seed."""
    run_dir: Annotated[Path | None, option("PATH", "runs/study-seeds-TIME")] = None
    """Folder of this study; an existing one is continued."""


def study_seeds(config: SeedsConfig) -> None:
    """Runs `python -m trainer study seeds`.

    Raises:
        TrainerError: see `trainer.errors`.
    """
    if config.runs < 1 or config.stack < 0 or config.first_seed < 0:
        raise ConfigError("--runs must be at least 1, --stack and --first-seed must not be negative")
    keep_freed_memory()
    with StopRequest() as stop, World.join(config.device) as world, Progress(is_main=world.is_main) as progress:
        recipe = replace(config.training(), set=config.set).resolve()
        config = replace(config, dataset=config.dataset and recipe.dataset)
        seeds = list(range(config.first_seed, config.first_seed + config.runs))
        details = f"seeds {seeds[0]} to {seeds[-1]}, each evaluated once on the test images; --runs asks for fewer"
        progress.log(describe_plan([recipe], config.runs, details))
        dataset, silent = config.load(recipe, world, progress.log), Progress(is_main=False)
        context = TrialContext(world=world, dataset=dataset, image_size=config.image_size, progress=silent, stop=stop)
        with StudyFolder.open("seeds", config, world) as folder, explain_interruption(folder):
            known = [RunFolder.read(path.parent) for path in folder.path.glob("seed-*/config.json")]
            check_known(context, [Trial(recipe, trial.fingerprint.seed, trial.path) for trial in known])
            if world.is_main:
                _warn_of_missing_evaluations(known, progress.log)
            trials = [Trial(recipe, seed, folder.path / f"seed-{seed}") for seed in seeds]
            _train_all(trials[world.rank :: world.size], config.stack, context, folder)
            wait_for_trials(world, [trial.path for trial in trials], _is_done)
            if world.is_main:
                results = _collect_results(folder)
                write_page(folder, make_page(recipe, results))


def _warn_of_missing_evaluations(trials: list[RunFolder], log: Callable[[str], None]) -> None:
    """Logs a line if the ledger lacks evaluations that the trials counted, as after a move of the study's folder."""
    results = [(trial, result) for trial in trials if (result := trial.result()) is not None]
    for trial, result in sorted(results, key=lambda each: each[1].num_test_looks or 0)[-1:]:
        missing = Ledger(trial.ledger_path).describe_missing(
            result.dataset_sha256, result.test_sha256, trial.path, result.num_test_looks or 0
        )
        if missing:
            log(f"warning: {missing}")


def _train_all(trials: list[Trial], most: int, context: TrialContext, folder: StudyFolder) -> None:
    """Trains and evaluates those of this rank's trials that have no result yet.

    Args:
        most: trials that are trained side by side, 0 to choose.
    """
    todo = [trial for trial in trials if not _is_done(trial.path)]
    began = time.monotonic()
    if len(todo) < len(trials):
        print(f"{len(trials) - len(todo)} of {len(trials)} seeds are done already", flush=True)
    for number, trained in enumerate(train_trials(context, todo, folder, most=most), start=1):
        seed = trained.trial.seed
        try:
            result = _evaluate_seed(trained, context.dataset)
        except DivergenceError as error:
            _record_divergence(trained.trial, error)
            continue
        print(
            f"seed {seed}: test error {100 * (1 - result.test_accuracy):.2f} %, "
            f"{result.train_seconds:.1f} s; {describe_left(began, number, len(todo))}",
            flush=True,
        )


def _record_divergence(trial: Trial, error: DivergenceError) -> None:
    print(f"seed {trial.seed}: {error}", flush=True)
    path = trial.path / DIVERGED_FILE
    with writing(path):
        write_json(path, {"seed": trial.seed, "error": str(error)})


def _evaluate_seed(trained: TrainedTrial, dataset: Dataset) -> Result:
    """Validates, evaluates on the test set once and writes the seed's result.

    Raises:
        DivergenceError: in the training or by an evaluation.
    """
    run = trained.run
    validation = validate(run)
    _, test, recorded = evaluate_on_test_set(run, dataset)
    assert recorded is not None
    # The accuracies of all seeds would be incomplete here; the study's page has them.
    result = replace(
        summarize(run, validation, test, recorded), test_accuracy_of_seeds=None, stacked=trained.num_together
    )
    with writing(run.folder.result_path):
        result.write(run.folder.result_path)
    return result


def _collect_results(folder: StudyFolder) -> SeedResults:
    """Returns every result of the setting: those in the folder, and others in the ledger."""
    trials = [RunFolder.read(path.parent) for path in folder.path.glob(f"seed-*/{RESULT_FILE}")]
    results = [result for trial in trials if (result := trial.result()) is not None]
    diverged = [int(path.parent.name.removeprefix("seed-")) for path in folder.path.glob(f"seed-*/{DIVERGED_FILE}")]
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


def _is_done(trial: Path) -> bool:
    return (trial / RESULT_FILE).exists() or (trial / DIVERGED_FILE).exists()
