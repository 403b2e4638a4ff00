"""A small grid or random search over a recipe's fields (pages 54 to 57 of the lecture: tuning, without cheating).

Candidates are trained and validated on a data set that was handed out without its test images, so no test image can
have a say in the choice; the winner's test accuracy is known only after a training run of its own, with one look.
"""

import itertools
import json
import math
import statistics
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from matplotlib.figure import Figure

from trainer.config import DeviceChoice, TrainConfig
from trainer.data import without_test_images
from trainer.data.augment import check_shift
from trainer.data.order import generator
from trainer.errors import ConfigError, DivergenceError, unknown_name, writing
from trainer.evaluation.evaluate import evaluate
from trainer.files import write_json
from trainer.hardware import keep_freed_memory
from trainer.paths import default_data_dir
from trainer.progress import Progress
from trainer.ranks.world import World
from trainer.recipes import Recipe
from trainer.report import figures
from trainer.report.figures import LIGHT
from trainer.signals import StopRequest
from trainer.studies.folder import StudyFolder
from trainer.studies.members import Workplace, telling_how_to_go_on, train_member
from trainer.studies.page import Page, Picture, Table, write_page
from trainer.train import load

_LIMITS = {"global_batch_size": (1, math.inf), "epochs": (1, math.inf), "label_smoothing": (0, 1)}
"""The least and the largest value of a field; other numbers must not be negative."""

Candidate = dict[str, float | int | str]
"""Field of the recipe, dotted for nested ones, or `lr_scale`: value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepConfig:
    """Try values of a recipe's fields, and rank them by validation accuracy. Candidates are shared by the ranks."""

    recipe: str = "mnist"
    """What to begin with."""
    grid: tuple[str, ...] = ("lr_scale=0.25,0.5,1,2",)
    """FIELD=VALUE,VALUE…, several: a recipe's fields, such as augment.shift, and lr_scale for its learning rates."""
    random: int = 0
    """Try this many of the grid's combinations, drawn at random; 0: all of them."""
    seeds: int = 1
    """Train each candidate from this many seeds, and rank by the mean."""
    dataset: str | None = None
    """Another data set than the recipe's, as for a training run."""
    image_size: int | None = None
    """For folder:PATH."""
    epochs: int | None = None
    """Instead of the recipe's."""
    data_dir: Path = field(default_factory=default_data_dir)
    """Where data sets are kept."""
    run_dir: Path | None = None
    """Folder of this study; an existing one is continued. [default: runs/study-sweep-TIME]"""
    device: DeviceChoice = "auto"
    """auto takes the GPUs if there are any, one for each rank."""


def study_sweep(config: SweepConfig) -> None:
    """`python -m trainer study sweep`.

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
        recipes = [change_recipe(base, candidate) for candidate in candidates]
        dataset = without_test_images(load(base, config.image_size, config.data_dir, world, progress.say))
        for recipe in recipes:
            check_shift(recipe.augment, dataset.train.images.size(2))
        place = Workplace(world=world, dataset=dataset, image_size=config.image_size, progress=progress, stop=stop)
        jobs = [(number, seed) for number in range(len(candidates)) for seed in range(config.seeds)]
        with (
            StudyFolder.enter("sweep", config, config.run_dir, world) as folder,
            telling_how_to_go_on(folder),
        ):
            for number, seed in jobs[world.rank :: world.size]:
                _try(place, folder, recipes[number], candidates[number], number, seed)
            if world.is_main:
                results = [_wait_for(folder, number, seed) for number, seed in jobs]
                if all(result["diverged"] for result in results):
                    raise DivergenceError(f"all {len(candidates)} candidates diverged: try smaller learning rates")
                with figures.style():
                    print(f"report: {write_page(folder, _page(base, candidates, results))}")


def make_candidates(grid: tuple[str, ...], num_random: int) -> list[Candidate]:
    """All combinations of the grid in order, or some of them at random (a fixed stream).

    Raises:
        ConfigError: an entry is not FIELD=VALUE,VALUE….
    """
    axes: list[list[tuple[str, float | int | str]]] = []
    for entry in grid:
        name, equals, values = entry.partition("=")
        if not equals or not name or not all(values.split(",")):
            raise ConfigError(f"--grid {entry}: write FIELD=VALUE,VALUE…, such as lr_scale=0.5,1,2")
        axes.append([(name, _parse(value)) for value in values.split(",")])
    combinations = [dict(combination) for combination in itertools.product(*axes)]
    if not num_random or num_random >= len(combinations):
        return combinations
    chosen = torch.randperm(len(combinations), generator=generator("sweep", 0))[:num_random]
    return [combinations[number] for number in sorted(chosen.tolist())]


def change_recipe(recipe: Recipe, candidate: Candidate) -> Recipe:
    """The recipe with a candidate's values.

    Raises:
        ConfigError: no such field, one that holds no single value of that kind, or a value that it cannot have.
    """
    for name, value in candidate.items():
        if name == "lr_scale":
            if isinstance(value, str) or value <= 0:
                raise ConfigError(f"--grid lr_scale={value}: must be a positive number")
            groups = {kind: replace(group, lr=group.lr * value) for kind, group in recipe.param_groups.items()}
            recipe = replace(recipe, param_groups=groups)
        else:
            recipe = _change(recipe, name, name, value)
    return recipe


def _change(holder: Any, path: str, full: str, value: float | int | str) -> Any:
    name, _, rest = path.partition(".")
    known = [each.name for each in fields(holder)]
    if name not in known:
        raise unknown_name("field of a recipe", full, [*known, "lr_scale"])
    old = getattr(holder, name)
    if rest:
        if not hasattr(old, "__dataclass_fields__"):
            raise ConfigError(f"--grid {full}: {name} has no fields of its own")
        return replace(holder, **{name: _change(old, rest, full, value)})
    if isinstance(old, float) and isinstance(value, int):
        value = float(value)
    if full == "num_validation":
        raise ConfigError("--grid num_validation: candidates are ranked by the same validation images")
    if type(old) is not type(value) or name in ("name", "summary", "dataset", "network"):
        raise ConfigError(f"--grid {full}={value}: a sweep changes single numbers and choices, and {full} is {old!r}")
    choices = get_args(get_type_hints(type(holder))[name])
    if choices and value not in choices:
        raise ConfigError(f"--grid {full}={value}: there are {', '.join(map(str, choices))}")
    least, most = _LIMITS.get(full, (0, math.inf))
    if not isinstance(value, str) and not (least <= value <= most and math.isfinite(value)):
        limits = f"at least {least}" if most == math.inf else f"between {least} and {most}"
        raise ConfigError(f"--grid {full}={value}: must be {limits}")
    return replace(holder, **{name: value})


def _parse(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _try(place: Workplace, folder: StudyFolder, recipe: Recipe, candidate: Candidate, number: int, seed: int) -> None:
    """Train and validate a candidate, unless an earlier sitting has."""
    path = _member_path(folder, number, seed)
    if _result_path(path).exists():
        return
    began = time.monotonic()
    found: dict[str, Any] = {"seed": seed, "values": candidate, "diverged": False}
    try:
        run = train_member(place, recipe, seed, path)
        seen = evaluate(run.learner.predict, run.validation_images, run.validation_indices, place.alone)
        found |= {"val_accuracy": seen.accuracy, "val_loss": seen.loss, "train_seconds": run.position.seconds}
        outcome = f"validation accuracy {100 * seen.accuracy:.2f} %"
    except DivergenceError as error:
        found |= {"val_accuracy": None, "val_loss": None, "train_seconds": time.monotonic() - began, "diverged": True}
        outcome = str(error)
    with writing(_result_path(path)):
        write_json(_result_path(path), found)
    print(f"{_name(candidate)}, seed {seed}: {outcome}", flush=True)


def _wait_for(folder: StudyFolder, number: int, seed: int) -> dict[str, Any]:
    """A candidate's result; another rank may still be at it."""
    path = _result_path(_member_path(folder, number, seed))
    while not path.exists():
        time.sleep(0.5)
    result: dict[str, Any] = {"number": number, "diverged": False, **json.loads(path.read_text())}
    return result


def _member_path(folder: StudyFolder, number: int, seed: int) -> Path:
    return folder.path / f"candidate-{number}-s{seed}"


def _result_path(member: Path) -> Path:
    return member / "candidate.json"


def _name(candidate: Candidate) -> str:
    return ", ".join(f"{name} {value}" for name, value in candidate.items())


def _page(base: Recipe, candidates: list[Candidate], results: list[dict[str, Any]]) -> Page:
    members = [[result for result in results if result["number"] == number] for number in range(len(candidates))]
    found = [[result["val_accuracy"] for result in mine if not result["diverged"]] for mine in members]
    num_seeds = len(members[0])
    # A mean of those seeds that did not diverge would flatter.
    means = [statistics.mean(mine) if len(mine) == num_seeds else None for mine in found]
    order = sorted(range(len(candidates)), key=lambda number: -(means[number] or 0.0))
    best, names = order[0], tuple(candidates[0])
    num_diverged, highest = means.count(None), means[best]
    if highest is None:
        findings = ["Every candidate diverged from one seed at least: none is the best."]
    else:
        findings = [
            f"Best on validation images: {_name(candidates[best])}, accuracy {100 * highest:.2f} %.",
            f"That figure is the best of {len(candidates)}, and so too good to be expected again: only a look at the "
            "test set tells, by a training run with these values. This study saw no test image.",
        ]
        if num_diverged:
            findings.append(
                f"{num_diverged} of {len(candidates)} candidates diverged, from one seed at least, and rank last."
            )
    return Page(
        title=f"{base.name} on {base.dataset}: {len(candidates)} candidates",
        findings=findings,
        pictures=[
            Picture(
                name="candidates",
                title="Validation accuracy, best first",
                text=f"A row for each candidate: its mean over {num_seeds} seed{'s' if num_seeds > 1 else ''}, and a "
                "small dot for each seed.",
                figure=_draw(
                    [_name(candidates[n]) for n in order],
                    [[100 * accuracy for accuracy in found[n]] for n in order],
                    [means[n] for n in order],
                ),
            )
        ],
        tables=[
            Table(
                name="candidates",
                title="Candidates",
                header=("rank", *names, "validation accuracy, %", "training, s"),
                rows=[
                    (
                        str(rank),
                        *candidates[number].values(),
                        "diverged" if (mean := means[number]) is None else 100 * mean,
                        sum(result["train_seconds"] for result in members[number]) / num_seeds,
                    )
                    for rank, number in enumerate(order, start=1)
                ],
            )
        ],
        result={
            "recipe": base.name,
            "best": None if highest is None else candidates[best],
            "val_accuracy": highest,
            "candidates": results,
        },
    )


def _draw(names: list[str], accuracies: list[list[float]], means: list[float | None]) -> Figure:
    figure = Figure(figsize=(7.2, 1.1 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    for row, (found, mean) in enumerate(zip(accuracies, means, strict=True)):
        axes.plot(found, [row] * len(found), color=LIGHT["train"], marker=".", linestyle="", alpha=0.5)
        if mean is not None:
            axes.plot([100 * mean], [row], color=LIGHT["wrong"], marker="o", linestyle="")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("validation accuracy, %")
    axes.grid(axis="both")
    axes.tick_params(length=0)
    return figure
