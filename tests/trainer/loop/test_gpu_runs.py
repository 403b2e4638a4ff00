"""Whole runs on a GPU: the captured steps compute what eager ones do, whatever the recipe has."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.trainer.loop.runs import ALONE, make_run
from trainer.data import Dataset, ImageSet
from trainer.loop.fit import fit
from trainer.recipes import RECIPES
from trainer.records.checkpoint import weights_sha256
from trainer.signals import StopRequest

FAST = replace(RECIPES["mnist-fast"], dataset="mnist-mini", epochs=2, global_batch_size=150, num_validation=50)
EVERYTHING = replace(
    FAST, clip_norm=2.0, ema_decay=0.9, resolutions=((0.5, 24),), augment=replace(FAST.augment, mixup=0.2)
)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_parts", [1, 2])
def test_a_captured_run_gives_the_bits_of_an_eager_one(
    num_parts: int, mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Muon, batch norm, clipping, an average of the weights, mixup, two sizes of images, parts of a batch.

    The 1,050 images of an epoch are whole batches only: those of another size would have kernels of their own.
    """
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # as in `World.join` on a GPU
    world = replace(ALONE, device=torch.device("cuda", 0), grad_accumulation=num_parts)
    few = replace(mini, train=ImageSet(mini.train.images[:1100], mini.train.labels[:1100]))
    graphs: set[torch.cuda.CUDAGraph] = set()
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (graphs.add(graph), replay(graph))[1])
    digests = []
    for is_captured in (False, True):
        run = make_run(EVERYTHING, few, tmp_path / str(is_captured), world=world)
        if not is_captured:
            run.learner = replace(run.learner, step=run.learner.train_step)
        with StopRequest() as stop:
            fit(run, stop)
        digests.append(weights_sha256(run.learner.evaluated_model))
        assert bool(graphs) == is_captured
    assert len(graphs) == 2
    assert digests[0] == digests[1]
