"""Runs inside a study: one recipe trained to its end by one rank alone, in a folder below the study's.

Knows how a member is trained and continued. Who may look at test images, and what a study makes of its members, is
the studies' own.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from convoy.processes import describe_output_error
from trainer.data import Dataset, without_test_images
from trainer.errors import Interrupted
from trainer.loop.fit import Run, fit, restore
from trainer.progress import Progress
from trainer.ranks.world import World
from trainer.recipes import Recipe
from trainer.records.fingerprint import Fingerprint
from trainer.records.run_folder import RunFolder
from trainer.signals import StopRequest
from trainer.studies.folder import StudyFolder
from trainer.train import setup


@dataclass(frozen=True, slots=True, kw_only=True)
class Workplace:
    """Where a rank trains members.

    Args:
        world: of all ranks of the study.
        image_size: as asked for on the command line.
    """

    world: World
    dataset: Dataset
    image_size: int | None
    progress: Progress
    stop: StopRequest

    @property
    def alone(self) -> World:
        """This rank as a world of its own."""
        return replace(self.world, rank=0, size=1, control=None, store=None)


def open_member(place: Workplace, recipe: Recipe, seed: int, path: Path) -> Run:
    """The run in that folder, begun or continued from its newest checkpoint; nothing is trained yet.

    Raises:
        ConfigError: the folder belongs to another run, or the network cannot take images of this size.
    """
    recipe = recipe.as_computed_on(place.world.device)
    fingerprint = Fingerprint.of(
        recipe, seed=seed, image_size=place.image_size, dataset_sha256=place.dataset.sha256, virtual_shards=None
    )
    run = setup(recipe, without_test_images(place.dataset), RunFolder(path, fingerprint), place.alone, place.progress)
    run.folder.enter("auto", place.alone)
    restore(run)
    return run


def train_member(place: Workplace, recipe: Recipe, seed: int, path: Path) -> Run:
    """The run, trained to its end.

    Raises:
        Interrupted: a signal came; the state is saved.
        DivergenceError: a loss is not finite.
    """
    run = open_member(place, recipe, seed, path)
    fit(run, place.stop)
    return run


@contextmanager
def telling_how_to_go_on(folder: StudyFolder) -> Iterator[None]:
    """Around a study's work: a signal ends the study, not the member that it finds; so does output that is not taken.

    Raises:
        Interrupted: what the study has found so far is in the folder.
    """
    try:
        yield
        return
    except Interrupted as error:
        cause, number = error.cause, error.signal_number
    except BrokenPipeError as error:
        cause, number = describe_output_error(error), signal.SIGPIPE
    raise Interrupted(cause, f"stopped; go on with the same command and --run-dir {folder.path}", number)
