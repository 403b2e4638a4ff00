"""One recipe from many seeds (page 53 of the lecture: "running 100 times our experiment on MNIST").

Every seed is a whole run with one look at the test set, which the workspace's ledger counts; the page shows them all,
with those of the same setting that were looked at outside the study.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer.config import DeviceChoice, TrainConfig
from trainer.data import Dataset
from trainer.errors import ConfigError, DivergenceError, writing
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.ledger import Ledger
from trainer.files import write_json
from trainer.hardware import keep_freed_memory
from trainer.loop.fit import Run
from trainer.paths import default_data_dir
from trainer.progress import Progress
from trainer.ranks.world import World
from trainer.recipes import Recipe
from trainer.records.checkpoint import Checkpoints
from trainer.records.run_folder import RunFolder
from trainer.report import figures
from trainer.signals import StopRequest
from trainer.studies.folder import StudyFolder
from trainer.studies.members import Workplace, open_member, telling_how_to_go_on, train_member
from trainer.studies.page import write_page
from trainer.studies.seeds_page import Outcome, make_page
from trainer.studies.stack import can_stack, measure_rate, train_stack
from trainer.train import evaluate_on_test_set, load, summarize

_STACK_SIZES = (1, 2, 4, 8, 16, 32)
_GAIN = 1.1
"""A stack must be this much faster to be taken: below, it is noise."""
_MEASURE_S = 4.0
"""About how long a stack size is measured."""
_GUESS_STEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedsConfig:
    """Run one recipe from many seeds; tell worst, median, best and how sure they are. Seeds are shared by the ranks."""

    recipe: str = "mnist"
    """What to run."""
    runs: int = 100
    """How many seeds, from --first-seed on."""
    first_seed: int = 0
    """The first one."""
    dataset: str | None = None
    """Another data set than the recipe's, as for a training run."""
    image_size: int | None = None
    """For folder:PATH."""
    epochs: int | None = None
    """Instead of the recipe's."""
    stack: int = 0
    """Seeds trained together as one network; 1: one after another; 0: measure what is fastest here, and take it."""
    data_dir: Path = field(default_factory=default_data_dir)
    """Where data sets are kept."""
    run_dir: Path | None = None
    """Folder of this study; an existing one is continued. [default: runs/study-seeds-TIME]"""
    device: DeviceChoice = "auto"
    """auto takes the GPUs if there are any, one for each rank."""


def study_seeds(config: SeedsConfig) -> None:
    """`python -m trainer study seeds`.

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
            raise ConfigError(f"--stack {config.stack}: {recipe.name} uses Muon, whose update has no stacked form")
        dataset = load(recipe, config.image_size, config.data_dir, world, progress.say)
        quiet = Progress(is_main=False)
        place = Workplace(world=world, dataset=dataset, image_size=config.image_size, progress=quiet, stop=stop)
        with (
            StudyFolder.enter("seeds", config, config.run_dir, world) as folder,
            telling_how_to_go_on(folder),
        ):
            rates = world.broadcast_object(_choose_stack(config, recipe, place, folder) if world.is_main else {})
            seeds = list(range(config.first_seed, config.first_seed + config.runs))
            _train_all(seeds[world.rank :: world.size], _best_stack(rates), recipe, place, folder)
            if world.is_main:
                outcome = _collect(seeds, folder)
                with figures.style():
                    print(f"report: {write_page(folder, make_page(recipe, outcome, rates))}")


def _choose_stack(config: SeedsConfig, recipe: Recipe, place: Workplace, folder: StudyFolder) -> dict[int, float]:
    """Images a second by size of stack, measured once per study; a size that was asked for is the only one."""
    if config.stack or config.runs == 1 or not can_stack(recipe):
        return {config.stack or 1: 0.0}
    known = folder.results().get("rates")
    if known is None:
        known = {}
        for size in (size for size in _STACK_SIZES if size <= config.runs):
            runs = [_fresh(place, recipe, seed, folder) for seed in range(size)]
            if runs[0].steps_per_epoch < _GUESS_STEPS:  # so few images train in no time either way
                return {1: 0.0}
            guess = measure_rate(runs, _GUESS_STEPS)
            num_steps = max(_GUESS_STEPS, int(guess * _MEASURE_S / (size * recipe.global_batch_size)))
            known[str(size)] = measure_rate(runs, min(num_steps, runs[0].steps_per_epoch))
            print(f"{size} together: {known[str(size)]:,.0f} images/s", flush=True)
            if known[str(size)] < 0.7 * max(known.values()):
                break  # it only becomes slower from here
        folder.add("rates", known)
    return {int(size): rate for size, rate in known.items()}


def _fresh(place: Workplace, recipe: Recipe, seed: int, folder: StudyFolder) -> Run:
    return open_member(place, recipe, seed, folder.path / "measured" / f"seed-{seed}")


def _best_stack(rates: dict[int, float]) -> int:
    best = max(rates, key=lambda size: rates[size])
    return best if 1 not in rates or rates[best] >= _GAIN * rates[1] else 1


def _train_all(seeds: list[int], stack: int, recipe: Recipe, place: Workplace, folder: StudyFolder) -> None:
    """This rank's seeds that have no result yet."""
    todo = [seed for seed in seeds if not _is_done(folder, seed)]
    began = time.monotonic()
    if len(todo) < len(seeds):
        print(f"{len(seeds) - len(todo)} of {len(seeds)} seeds are done already", flush=True)
    for start in range(0, len(todo), stack):
        group = todo[start : start + stack]
        for run, num_stacked in _train_group(group, recipe, place, folder):
            result = _finish(run, place.dataset, num_stacked)
            number = start + group.index(run.seed) + 1
            left = (time.monotonic() - began) / (start + len(group)) * (len(todo) - start - len(group))
            print(
                f"seed {run.seed}: test error {100 * (1 - result['test_accuracy']):.2f} %, "
                f"{result['train_seconds']:.1f} s; {number} of {len(todo)}, {left / 60:.0f} min left",
                flush=True,
            )


def _train_group(group: list[int], recipe: Recipe, place: Workplace, folder: StudyFolder) -> Iterator[tuple[Run, int]]:
    """The runs of these seeds, trained to their end, each with how many were stacked.

    Who diverges is written down and left out; who has been trained before, alone, or to the end, goes on alone.
    """
    stacked = _train_stacked(group, recipe, place, folder) if len(group) > 1 else {}
    for seed in group:
        if seed in stacked:
            yield stacked[seed], len(stacked)
        elif (run := _train_alone(seed, recipe, place, folder)) is not None:
            yield run, 1


def _train_stacked(group: list[int], recipe: Recipe, place: Workplace, folder: StudyFolder) -> dict[int, Run]:
    """Those of the group that nobody has trained yet, by seed, trained together; none where they diverge."""
    runs = [open_member(place, recipe, seed, _member_path(folder, seed)) for seed in group]
    fresh = {run.seed: run for run in runs if run.position.step == 0}
    if len(fresh) < 2:
        return {}
    try:
        train_stack(list(fresh.values()), Checkpoints(folder.path / f"stack-{'-'.join(map(str, fresh))}", print))
    except DivergenceError as error:
        print(f"{error}; the seeds {', '.join(map(str, fresh))} go on one after another", flush=True)
        return {}
    return fresh


def _train_alone(seed: int, recipe: Recipe, place: Workplace, folder: StudyFolder) -> Run | None:
    try:
        return train_member(place, recipe, seed, _member_path(folder, seed))
    except DivergenceError as error:
        print(f"seed {seed}: {error}", flush=True)
        path = _diverged_path(folder, seed)
        with writing(path):
            write_json(path, {"seed": seed, "error": str(error)})
        return None


def _finish(run: Run, dataset: Dataset, num_stacked: int) -> dict[str, Any]:
    """Validates, evaluates on the test set once and writes the seed's result."""
    validation = evaluate(run.learner.predict, run.validation_images, run.validation_indices, run.world)
    _, _, recorded = evaluate_on_test_set(run, dataset)
    assert recorded is not None
    result = summarize(run, validation, recorded) | {"stacked": num_stacked}
    del result["test_accuracy_of_seeds"]  # grows with each seed, and the study's page has them all
    with writing(run.folder.result_path):
        write_json(run.folder.result_path, result)
    return result


def _collect(seeds: list[int], folder: StudyFolder) -> Outcome:
    """What became of all seeds in the folder, those of earlier sittings included, and what else the ledger knows.

    Waits for other ranks' seeds without a collective, which would time out.
    """
    while not all(_is_done(folder, seed) for seed in seeds):
        time.sleep(0.5)
    members = [RunFolder.read(path.parent) for path in folder.path.glob("seed-*/result.json")]
    results = [json.loads(member.result_path.read_text()) for member in members]
    diverged = [json.loads(path.read_text())["seed"] for path in folder.path.glob("seed-*/diverged.json")]
    if not results:
        raise DivergenceError(f"all {len(diverged)} seeds diverged: no figure can be told; try smaller learning rates")
    known = {result["weights_sha256"] for result in results}
    ledger = Ledger(members[0].ledger_path)
    looks = [
        look
        for setting in {member.fingerprint.setting_sha256 for member in members}
        for look in ledger.of_setting(setting)
    ]
    return Outcome(
        results=sorted(results, key=lambda result: result["seed"]),
        diverged=sorted(diverged),
        others=[look for look in looks if look["weights_sha256"] not in known],
        num_looks=len(ledger.entries(results[0]["dataset_sha256"])),
    )


def _member_path(folder: StudyFolder, seed: int) -> Path:
    return folder.path / f"seed-{seed}"


def _result_path(folder: StudyFolder, seed: int) -> Path:
    return _member_path(folder, seed) / "result.json"


def _diverged_path(folder: StudyFolder, seed: int) -> Path:
    return _member_path(folder, seed) / "diverged.json"


def _is_done(folder: StudyFolder, seed: int) -> bool:
    return _result_path(folder, seed).exists() or _diverged_path(folder, seed).exists()
