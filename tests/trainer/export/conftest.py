"""A trained run and its exported files, made once because each takes seconds."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trainer.config import TrainConfig
from trainer.data import Dataset, ImageSet
from trainer.export import pipeline
from trainer.export.formats import convert
from trainer.export.parity import QUICK
from trainer.export.parity_images import ParityImages
from trainer.export.reference import ReferenceModel
from trainer.export.repository import RepositoryModel
from trainer.loop.fit import fit
from trainer.loop.run import Run
from trainer.progress import Progress
from trainer.ranks.world import World
from trainer.recipes import RECIPES
from trainer.records.run_folder import RunFolder
from trainer.signals import StopRequest
from trainer.train import setup

PATIENT = replace(QUICK, reference_s=None, served_s=None, largest_s=None, small_s=60.0)
"""The default plan, for a machine that may stand still for seconds: the number of images is always the same."""
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), num_threads=1)


@pytest.fixture(scope="session")
def run(mini: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The lecture's net, trained for four epochs on 1,350 images of `mnist-mini` and validated on 150 others."""
    recipe = replace(RECIPES["mnist"], dataset="mnist-mini", epochs=4)
    some = replace(mini, train=ImageSet(mini.train.images[:1500], mini.train.labels[:1500]))
    config = TrainConfig(run_dir=tmp_path_factory.mktemp("runs") / "run")
    folder = RunFolder.plan(config, recipe, some, ALONE)
    folder.enter(config.resume, ALONE)
    run = setup(recipe, some, folder, ALONE, Progress(is_main=True))
    with StopRequest() as stop:
        fit(run, stop)
    return run


@pytest.fixture(scope="module", autouse=True)
def patient() -> Iterator[None]:
    """Exports without time limits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "QUICK", PATIENT)
        yield


@pytest.fixture(scope="session")
def reference(run: Run) -> ReferenceModel:
    return ReferenceModel.from_run(run, None, PATIENT, "one", lambda line: None)


@pytest.fixture(scope="session")
def files(reference: ReferenceModel) -> dict[str, bytes]:
    """The run's model in every format."""
    return convert(*reference.export_module())


@pytest.fixture
def model(tmp_path: Path) -> RepositoryModel:
    """A model for digits in an empty repository."""
    labels = tuple(str(digit) for digit in range(10))
    return RepositoryModel(repository=tmp_path / "models", name="digits", image_shape=(1, 28, 28), labels=labels)


@pytest.fixture
def images() -> ParityImages:
    """Random images, 40 for validation and 5 for training."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (100, 1, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.arange(100) % 10
    everything = ImageSet(images, labels)
    return ParityImages((everything, torch.arange(10, 50)), (everything, torch.arange(60, 65)), 100)
