"""From the command line of `convoy jobs submit` to a job."""

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from convoy.options import option
from trainer.cli import parse, read_command_line
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.local import LocalTrainConfig, as_arguments, resolve
from trainer.paths import image_folder
from trainer.service.jobs import DEFAULT_RETRIES, MAX_NUMBER, JobSpec

_OURS: Mapping[str, str] = {
    "--run-dir": "give --run-dir before the --",
    "--nproc": "give --ranks before the --",
    "--help": "convoy train --help shows these options",
    "-h": "convoy train --help shows these options",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What a job needs, beside the options of its training."""

    path_or_recipe: Annotated[str | None, tyro.conf.Positional, option("[PATH-OR-RECIPE]", "the recipe mnist")] = None
    """A folder of images, or a recipe, as for convoy train."""
    recipe: Annotated[str | None, option("RECIPE", "mnist")] = None
    """The recipe; the same as giving it as PATH-OR-RECIPE."""
    engine: Annotated[str, option("NAME", "local")] = "local"
    """What runs the job: local (this machine), slurm or kubernetes (a cluster)."""
    gpus: int = 0
    """GPUs that the job has to itself; 0 to compute on CPUs."""
    cpus: Annotated[int, option("N", "all, or with GPUs none of its own")] = 0
    """CPUs that the job has to itself."""
    ranks: Annotated[int, option("N", "one for each GPU, or 1")] = 0
    """Processes of the training, which are its ranks."""
    memory_gb: Annotated[float, option("GB", "no limit")] = 0.0
    """Limit of the job's memory."""
    priority: int = 0
    """Jobs of a higher priority start first."""
    max_retries: int = DEFAULT_RETRIES
    """How often a failure that may pass is tried again."""
    nodes: Annotated[str, option("N or MIN:MAX", "1")] = "1"
    """Hosts, for the engine of a cluster; --gpus, --cpus, --ranks and --memory-gb are those of each."""
    engine_options: Annotated[tuple[str, ...], option("NAME=VALUE ...", "none")] = ()
    """Options of the engine itself, such as partition=gpu time=4:00:00 for slurm, which are sbatch's."""
    run_dir: Annotated[Path | None, option("PATH", "runs/job-NUMBER-NAME")] = None
    """Folder of the run. An unfinished run in it is continued."""


def to_spec(submission: Submission, training: Sequence[str]) -> JobSpec:
    """Returns the job of a submission, after a check of its training's options.

    Args:
        training: options of `convoy train`.

    Raises:
        ConfigError: says which option is wrong.
    """
    for name in ("gpus", "cpus", "ranks", "max_retries", "memory_gb"):
        value = getattr(submission, name)
        if not 0 <= value <= MAX_NUMBER:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 0, and at most {MAX_NUMBER}")
    arguments = [*([submission.path_or_recipe] if submission.path_or_recipe else []), *training]
    if submission.recipe:
        arguments = ["--recipe", submission.recipe, *arguments]
    for argument in training:
        if argument.partition("=")[0] in _OURS:
            raise ConfigError(f"{argument} after the --: {_OURS[argument.partition('=')[0]]}")
    options = dict(option.partition("=")[::2] for option in submission.engine_options)
    if submission.gpus == 0 and "--device" not in [argument.partition("=")[0] for argument in training]:
        arguments += ["--device", "cpu"]
    run, name = read_training(arguments)
    try:
        here = Path.cwd()
    except FileNotFoundError:
        raise ConfigError("the folder of this shell is gone: change to another one") from None
    run_folder = (here / (submission.run_dir or Path("runs") / f"job-{{id}}-{name}")).absolute()
    return JobSpec(
        arguments=("--recipe", run.recipe, *as_arguments(replace(run, recipe=TrainConfig().recipe))),
        engine=submission.engine,
        gpus=submission.gpus,
        cpus=submission.cpus,
        ranks=submission.ranks,
        nodes=_nodes(submission.nodes),
        engine_options=options,
        memory_mb=round(submission.memory_gb * 1000),
        priority=submission.priority,
        max_retries=submission.max_retries,
        working_folder=str(here),
        run_folder=str(run_folder),
    )


def _nodes(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 0 < least <= most <= MAX_NUMBER:
        raise ConfigError(f"--nodes {text[:40]}: must be a number of hosts, or MIN:MAX")
    return least, most


def read_training(arguments: Sequence[str]) -> tuple[TrainConfig, str]:
    """Reads the command line of a training, and checks it as far as that needs no data.

    Returns:
        The training, and a name for its folder: the recipe, or that of the folder of images.

    Raises:
        ConfigError: it is faulty.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            line = read_command_line(arguments)
            default = LocalTrainConfig(run=line.default)
            config = parse(LocalTrainConfig, line.arguments, prog="convoy train", default=default)
    except SystemExit:
        raise ConfigError(f"options of convoy train: {_plain(errors.getvalue())}") from None
    run, _ = resolve(replace(config, run=line.combine(config.run)), line.given)
    recipe = run.resolve()
    root = image_folder(recipe.dataset)
    name = recipe.name if root is None else root.name
    return run, re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-_.") or "run"


def _plain(text: str) -> str:
    """Returns the message in a box of tyro's as one line."""
    lines = [re.sub(r"[─│╭╮╰╯]", " ", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("For full helptext")]
    return " ".join(lines).removeprefix("error: ").removeprefix("Parsing error ") or "see convoy train --help"
