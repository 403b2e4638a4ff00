"""The sources of batches: every source, any number of threads and every restart give the same batches."""

import threading
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from convoy.images import Box, Pixels
from tests.trainer.loop.runs import ALONE, SHORT, losses, make_run
from trainer.data import Dataset
from trainer.data.augment import draw_crops
from trainer.errors import DataError
from trainer.loop import streamed
from trainer.loop.fit import fit
from trainer.loop.run import Run
from trainer.loop.sources import BatchSource, ResidentSource, open_source
from trainer.loop.step import Batch
from trainer.loop.streamed import StreamedSource, WaitRecord
from trainer.progress import Progress
from trainer.ranks.activity import SLOW_PHASE_TIMEOUT_S, Activity
from trainer.ranks.world import World
from trainer.recipes import Augment
from trainer.records.checkpoint import weights_sha256
from trainer.signals import StopRequest

CROPPED = replace(SHORT, augment=Augment(crop_area=0.3, flip="random"))
SMALL_BATCHES = replace(SHORT, global_batch_size=64, augment=Augment(shift=2))


class Files:
    """The training images of a data set, as if they were files of several sizes; a box darkens its image."""

    def __init__(self, dataset: Dataset, bad: int | None = None, delay_s: float = 0.0) -> None:
        self._images = dataset.train.take(torch.arange(len(dataset.train))).numpy()
        self.shape = dataset.train.shape
        self.sizes = torch.tensor([[28, 28], [40, 30]], dtype=torch.int32).repeat(len(self._images) // 2, 1)
        self.decoded: list[int] = []
        self._bad = bad
        self._delay_s = delay_s

    def decode(self, index: int, box: Box | None) -> Pixels:
        self.decoded.append(index)
        time.sleep(self._delay_s)
        if index == self._bad:
            raise DataError(f"image {index} has changed")
        pixels: Pixels = self._images[index]
        return pixels if box is None else (pixels * np.float32(sum(box) / 4)).astype(np.uint8)


def assert_same(found: Batch, expected: Batch) -> None:
    """The same images, wherever their pools are, and the same of all else."""
    assert torch.equal(found.images[found.indices], expected.images[expected.indices])
    for name in {field.name for field in fields(Batch)} - {"images", "indices"}:
        mine, theirs = getattr(found, name), getattr(expected, name)
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs, name


def test_images_in_memory_are_gathered_by_the_step(mini: Dataset, tmp_path: Path) -> None:
    run = make_run(SMALL_BATCHES, mini, tmp_path)
    source = open_source(run)
    first, last = source.batch(70), source.batch(71)
    assert first.images is last.images  # a CUDA graph reads them where they are
    assert not first.owns_images
    assert [len(batch.indices) for batch in (first, last)] == [4500 % 64, 64]
    assert torch.equal(first.labels, mini.train.labels[first.indices])
    source.close()


@pytest.mark.parametrize("num_threads", [1, 8])
def test_streamed_batches_are_the_resident_ones_for_any_number_of_threads(
    mini: Dataset, tmp_path: Path, num_threads: int
) -> None:
    """Across the end of an epoch, whose last batch is smaller."""
    run = make_run(SMALL_BATCHES, mini, tmp_path, world=replace(ALONE, num_cpus=num_threads))
    resident, source = ResidentSource(run), StreamedSource(run, Files(mini))
    for step in (68, 69, 70, 71, 72):
        batch = source.batch(step)
        assert batch.owns_images
        assert_same(batch, resident.batch(step))
    source.close()


def test_crops_belong_to_the_samples(mini: Dataset, tmp_path: Path) -> None:
    run, files = make_run(CROPPED, mini, tmp_path), Files(mini)
    boxes = draw_crops(CROPPED.augment, files.sizes, run.seed, 1)
    source = StreamedSource(run, files)
    batch = source.batch(46)
    source.close()
    indices = ResidentSource(run).batch(46).indices.tolist()
    for position in (0, 99):
        expected = files.decode(indices[position], boxes[indices[position]].tolist())
        assert np.array_equal(batch.images[position].numpy(), expected)


def test_a_sample_that_comes_twice_is_cropped_in_two_ways(mini: Dataset, tmp_path: Path) -> None:
    recipe = replace(CROPPED, balanced_sampling=True, global_batch_size=4500, epochs=1)
    run, files = make_run(recipe, mini, tmp_path), Files(mini)
    seen: dict[int, set[Box]] = {}
    files.decode = lambda index, box: seen.setdefault(index, set()).add(box) or np.zeros(files.shape, np.uint8)  # type: ignore[method-assign]
    source = StreamedSource(run, files)
    batch = source.batch(0)
    source.close()
    counts = torch.bincount(batch.labels)
    assert int(counts.max() - counts.min()) <= 1
    assert any(len(boxes) > 1 for boxes in seen.values())


def test_ranks_decode_their_own_share_alone(mini: Dataset, tmp_path: Path) -> None:
    decoded = []
    for rank in range(2):
        world = World(rank=rank, size=2, local_rank=rank, device=torch.device("cpu"), num_threads=1)
        run = make_run(SMALL_BATCHES, mini, tmp_path, world=ALONE)
        run.world, files = world, Files(mini)
        source = StreamedSource(run, files)
        batch = source.batch(0)
        source.close()
        decoded.append(files.decoded[: len(batch.images)])  # the one thread goes on to the next batches
    assert decoded[0] + decoded[1] == ResidentSource(make_run(SMALL_BATCHES, mini, tmp_path)).batch(0).indices.tolist()


def test_a_restart_decodes_nothing_that_was_done_before(mini: Dataset, tmp_path: Path) -> None:
    run = make_run(SMALL_BATCHES, mini, tmp_path)
    resident, files = ResidentSource(run), Files(mini)
    source = StreamedSource(run, files)
    assert_same(source.batch(40), resident.batch(40))
    source.close()
    done = {index for step in range(40) for index in resident.batch(step).indices.tolist()}
    assert not done & set(files.decoded)


def test_a_bounded_number_of_batches_is_decoded_ahead(mini: Dataset, tmp_path: Path) -> None:
    run, files = make_run(SMALL_BATCHES, mini, tmp_path), Files(mini)
    source = StreamedSource(run, files)
    source.batch(0)
    source._pool._pool.shutdown()  # waits for all that has begun
    assert len(files.decoded) == (1 + streamed._MAX_AHEAD) * 64


def test_an_image_that_cannot_be_decoded_ends_the_step_that_needs_it(mini: Dataset, tmp_path: Path) -> None:
    run = make_run(SMALL_BATCHES, mini, tmp_path)
    bad = int(ResidentSource(run).batch(2).indices[5])
    source = StreamedSource(run, Files(mini, bad))
    source.batch(0)
    source.batch(1)
    with pytest.raises(DataError, match=f"image {bad} has changed"):
        source.batch(2)
    source.close()


def test_training_from_either_source_gives_the_same_weights(
    mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(mini, train=type(mini.train)(mini.train.images[:600], mini.train.labels[:600]))  # type: ignore[attr-defined, call-arg]

    def stream(run: Run) -> BatchSource:
        return StreamedSource(run, Files(few))

    digests = []
    for opened in (ResidentSource, stream):
        monkeypatch.setattr("trainer.loop.fit.open_source", opened)
        run = make_run(SMALL_BATCHES, few, tmp_path / opened.__name__)
        with StopRequest() as stop:
            fit(run, stop)
        digests.append(weights_sha256(run.learner.model))
    assert digests[0] == digests[1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode_")]


def test_waiting_for_images_does_not_count_as_a_hang(
    mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "_SHORT_WAIT_S", 0.01)
    world = replace(ALONE, activity=Activity(hang_timeout_s=0.5))
    run = make_run(replace(SMALL_BATCHES, global_batch_size=4), mini, tmp_path, world=world)
    world.activity.timeout_s = 1.0
    seen = []
    files = Files(mini)
    decode = files.decode

    def slow(index: int, box: Box | None) -> Pixels:
        time.sleep(0.05)
        seen.append((world.activity.timeout_s, world.activity.idle_s))
        return decode(index, box)

    files.decode = slow  # type: ignore[method-assign]
    source = StreamedSource(run, files)
    with world.activity.computing():
        source.batch(0)
    source.close()
    assert (SLOW_PHASE_TIMEOUT_S, 0.0) in seen


def test_the_user_is_told_once_that_images_come_too_slowly(
    mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(streamed, "_JUDGED_AFTER_S", 0.01)
    run = make_run(replace(SMALL_BATCHES, global_batch_size=4), mini, tmp_path)
    run.progress = Progress(is_main=True)
    source = StreamedSource(run, Files(mini, delay_s=0.01))
    for step in range(6):
        source.batch(step)
    source.close()
    line = capsys.readouterr().out
    assert line.startswith("the training waits for images for ")
    assert line.endswith(
        " % of its time, with 1 thread to decode them: give each rank more CPUs, or store smaller images (a shorter "
        "side of 56 pixels suffices)\n"
    )


def test_time_between_epochs_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 7.0, 100.0, 101.0])
    monkeypatch.setattr(streamed, "time", SimpleNamespace(monotonic=lambda: next(times)))
    record = WaitRecord(1)
    for is_counted in (False, True, False):
        with record.waiting(is_counted=is_counted):
            pass
    assert (record._worked_s, record._waited_s) == (2.0, 4.0)


def test_the_first_losses_are_the_same_from_a_stream(
    mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With crops: the decoder's, in place of those of the step."""
    monkeypatch.setattr("trainer.loop.fit.open_source", lambda run: StreamedSource(run, Files(mini)))
    found = losses(make_run(CROPPED, mini, tmp_path), 3)
    assert len(found) == 3
    assert all(1 < loss < 4 for loss in found)


def test_an_epoch_that_is_drawn_ahead_is_the_same(mini: Dataset, tmp_path: Path) -> None:
    run = make_run(SMALL_BATCHES, mini, tmp_path)
    ahead, plain = ResidentSource(run), ResidentSource(run)
    ahead._draws_ahead = True  # as on a GPU
    last = 2 * run.steps_per_epoch - 1
    for step in (0, 1, run.steps_per_epoch, last, 3):  # the second epoch was drawn ahead, the first again was not
        assert_same(ahead.batch(step), plain.batch(step))
    ahead.close()
