"""A step that does not fit in a GPU's memory ends in one line with the options that help."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.loop.runs import ALONE, SHORT, make_run
from trainer.config import TrainConfig
from trainer.data import Dataset, ImageSet
from trainer.errors import ConfigError
from trainer.loop.fit import fit
from trainer.ranks.world import _check_shards
from trainer.records.checkpoint import weights_sha256
from trainer.signals import StopRequest


@pytest.mark.parametrize(
    ("world", "advice"),
    [
        ({}, "; continue with --grad-accumulation 2, which computes them in 2 parts, or use a smaller --global-batch-"),
        ({"grad_accumulation": 3}, "; continue with --grad-accumulation 6, which computes them in 6 parts, or"),
        ({"grad_accumulation": 100}, "; use smaller images, a smaller network or more GPUs"),
        ({"virtual_shards": 4}, "; train anew with --virtual-shards 8 or a smaller --global-batch-size"),
    ],
)
def test_the_line_names_the_options(world: dict[str, int], advice: str, mini: Dataset, tmp_path: Path) -> None:
    run = make_run(SHORT, mini, tmp_path / "run", world=replace(ALONE, **world))  # type: ignore[arg-type]

    def fail(batch: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.2 GiB "
            "is free.\nSee documentation for Memory Management."
        )

    run.learner = replace(run.learner, step=fail)
    with StopRequest() as stop, pytest.raises(ConfigError) as caught:
        fit(run, stop)
    text = str(caught.value)
    assert text.startswith("the GPU's memory does not hold a step of 100 images: Tried to allocate 2.00 GiB" + advice)
    assert "\n" not in text


def test_images_that_do_not_fit_are_told_so(mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(SHORT, mini, tmp_path / "run")

    def fail(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "to", fail)
    with (
        StopRequest() as stop,
        pytest.raises(ConfigError, match=r"not hold the 5,000 training images of 0"),
    ):
        fit(run, stop)


def test_impossible_numbers_of_parts_are_refused() -> None:
    with pytest.raises(ConfigError, match="--grad-accumulation 200 of a global batch of 100 images: use at most"):
        TrainConfig(grad_accumulation=200).resolve()
    _check_shards(8, 2, 4, is_elastic=False)
    with pytest.raises(ConfigError, match=r"--grad-accumulation 4 with --virtual-shards 4 and 2 ranks: .* at least 8"):
        _check_shards(4, 2, 4, is_elastic=False)


def test_accumulated_gradients_are_those_of_as_many_virtual_shards(mini: Dataset, tmp_path: Path) -> None:
    """To the bit, and up to rounding those of the whole batch."""
    few = replace(mini, train=ImageSet(mini.train.images[:330], mini.train.labels[:330]))
    digests, weights = [], []
    for number, world in enumerate(({"grad_accumulation": 4}, {"virtual_shards": 4}, {})):
        run = make_run(SHORT, few, tmp_path / str(number), world=replace(ALONE, **world))  # type: ignore[arg-type]
        with StopRequest() as stop:
            fit(run, stop)
        digests.append(weights_sha256(run.learner.model))
        weights.append(run.learner.model.state_dict())
    assert digests[0] == digests[1] != digests[2]
    assert all(torch.allclose(weights[0][name], weights[2][name], atol=1e-3) for name in weights[0])
