"""Exact evaluation: every image once, for every world size."""

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from trainer.data import Images, ImageSet
from trainer.errors import DivergenceError
from trainer.evaluation.evaluate import CHUNK_SIZE, Evaluation, chunk_size, evaluate
from trainer.ranks.activity import SLOW_PHASE_TIMEOUT_S, Activity
from trainer.ranks.world import World

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), num_threads=1)


def _labelled(num_images: int) -> ImageSet:
    generator = torch.Generator().manual_seed(num_images)
    images = torch.randint(0, 256, (num_images, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.randint(0, 5, (num_images,), generator=generator))


def _first_pixels(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.flatten(1)[:, :5].float() / 50


@given(num_images=st.sampled_from([1, 2, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 3 * CHUNK_SIZE + 7]))
def test_evaluate_equals_a_computation_in_one_piece(num_images: int) -> None:
    images = _labelled(num_images)
    seen = evaluate(_first_pixels, images, None, ALONE)
    logits = _first_pixels(images.images)
    assert torch.equal(seen.predicted, logits.argmax(dim=1))
    assert seen.num_errors == int((logits.argmax(dim=1) != images.labels).sum())
    assert seen.num_images == num_images
    assert seen.loss == pytest.approx(F.cross_entropy(logits, images.labels).item(), rel=1e-5)
    probabilities = logits.softmax(dim=1)
    assert torch.allclose(seen.confidence, probabilities.max(dim=1).values)
    assert torch.allclose(seen.label_probability, probabilities.gather(1, images.labels[:, None])[:, 0])


def test_outputs_that_are_no_numbers_are_no_answers() -> None:
    """`argmax` takes the first NaN for the greatest number: images of class 0 would count as right."""
    images = _labelled(CHUNK_SIZE + 9)
    images.labels[[7, CHUNK_SIZE + 1]] = 0

    def predict(pixels: torch.Tensor) -> torch.Tensor:
        is_bad = (pixels == images.images[7]).flatten(1).all(dim=1)
        is_bad |= (pixels == images.images[CHUNK_SIZE + 1]).flatten(1).all(dim=1)
        return _first_pixels(pixels).masked_fill(is_bad[:, None], torch.nan)

    with pytest.raises(DivergenceError, match=r"outputs for 2 of 509 images are not finite, first for image 7$"):
        evaluate(predict, images, None, ALONE)


@given(world_size=st.integers(min_value=1, max_value=9))
def test_the_ranks_together_compute_each_image_once(world_size: int) -> None:
    images = _labelled(4 * CHUNK_SIZE + 3)
    seen: list[torch.Tensor] = []

    def predict(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(pixels)
        return _first_pixels(pixels)

    class OneOfSeveral(World):
        """A rank without the others, whose zeros it would add."""

        def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor

    for rank in range(world_size):
        world = OneOfSeveral(rank=rank, size=world_size, local_rank=rank, device=torch.device("cpu"), num_threads=1)
        evaluate(predict, images, None, world)
    assert sum(map(len, seen)) == len(images.labels)
    assert torch.equal(torch.cat(seen).flatten(1).sum(dim=0), images.images.flatten(1).sum(dim=0))


def test_large_images_come_in_smaller_chunks() -> None:
    """A batch of 500 photographs does not fit in a small GPU; small images keep the batches of earlier results."""
    assert [chunk_size((3, side, side)) for side in (28, 32, 80, 224, 4000)] == [500, 500, 500, 64, 1]


class SmallDevice:
    """A model on a device whose memory holds only so many images at a time."""

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images
        self.sizes: list[int] = []

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(pixels))
        if len(pixels) > self.num_images:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return _first_pixels(pixels)


@pytest.mark.parametrize("num_images", [1, 130, CHUNK_SIZE])
def test_a_chunk_that_does_not_fit_in_memory_is_computed_in_parts(num_images: int) -> None:
    images, small = _labelled(CHUNK_SIZE + 7), SmallDevice(num_images)
    seen = evaluate(small, images, None, ALONE, predict_with_views=lambda pixels: -small(pixels))
    expected = evaluate(_first_pixels, images, None, ALONE, predict_with_views=lambda pixels: -_first_pixels(pixels))
    for name in ("labels", "predicted", "confidence", "label_probability", "predicted_with_views"):
        assert torch.equal(getattr(seen, name), getattr(expected, name)), name
    assert seen.loss == expected.loss
    fitting = {1: 1, 130: 125, CHUNK_SIZE: CHUNK_SIZE}[num_images]
    tried = small.sizes[: small.sizes.index(fitting)]
    assert tried == [CHUNK_SIZE >> number for number in range(len(tried))]
    assert max(small.sizes[len(tried) :]) == fitting, "the chunks after it begin with the size that fits"


def test_an_image_that_does_not_fit_in_memory_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(SmallDevice(0), _labelled(3), None, ALONE)


def test_only_the_images_at_the_indices_are_evaluated() -> None:
    images = _labelled(100)
    indices = torch.tensor([3, 50, 7])
    seen = evaluate(_first_pixels, images, indices, ALONE)
    assert torch.equal(seen.labels, images.labels[indices])
    assert torch.equal(seen.predicted, _first_pixels(images.images[indices]).argmax(dim=1))


@given(num_images=st.sampled_from([1, CHUNK_SIZE + 1]))
def test_views_are_a_second_figure_of_the_same_images(num_images: int) -> None:
    images = _labelled(num_images)
    seen = evaluate(_first_pixels, images, None, ALONE, predict_with_views=lambda pixels: -_first_pixels(pixels))
    alone = evaluate(_first_pixels, images, None, ALONE)
    assert torch.equal(seen.predicted, alone.predicted)
    assert (seen.loss, seen.num_errors) == (alone.loss, alone.num_errors)
    wrong = _first_pixels(images.images).argmin(dim=1) != images.labels
    assert seen.num_errors_with_views == int(wrong.sum())
    assert seen.accuracy_with_views == pytest.approx(1 - wrong.double().mean().item())
    assert alone.num_errors_with_views is alone.accuracy_with_views is None


def test_the_recall_of_a_class_is_the_share_of_its_own_images() -> None:
    labels, predicted = torch.tensor([0, 0, 0, 2]), torch.tensor([0, 0, 2, 0])
    ones = torch.ones(4)
    seen = Evaluation(labels=labels, predicted=predicted, confidence=ones, label_probability=ones, loss=0.0)
    assert seen.recall_by_class(("a", "b", "c")) == {"a": 2 / 3, "c": 0.0}  # b has no images


def test_the_confusion_matrix_has_labels_in_rows() -> None:
    labels, predicted = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 0])
    ones = torch.ones(4)
    seen = Evaluation(labels=labels, predicted=predicted, confidence=ones, label_probability=ones, loss=0.0)
    assert seen.confusion(3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert seen.accuracy == 0.5


def test_the_accuracy_of_no_images_is_zero() -> None:
    none = torch.empty(0)
    empty = Evaluation(labels=none, predicted=none, confidence=none, label_probability=none, loss=0.0)
    assert empty.accuracy == 0


def test_a_rank_that_waits_for_files_does_not_hang() -> None:
    """Another rank would wait for it for `SLOW_PHASE_TIMEOUT_S`; while it computes, an idle process hangs."""
    world = replace(ALONE, activity=Activity(hang_timeout_s=0.5))
    world.activity.timeout_s = 1.0
    images, seen = _labelled(CHUNK_SIZE + 1), []

    class Files:
        labels, shape = images.labels, images.shape

        def chunks(self, indices: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
            for chunk in images.chunks(indices, size):
                seen.append((world.activity.timeout_s, world.activity._is_computing))
                yield chunk

    found = evaluate(_first_pixels, cast(Images, Files()), None, world)
    assert seen == [(SLOW_PHASE_TIMEOUT_S, False)] * 2
    assert torch.equal(found.predicted, evaluate(_first_pixels, images, None, ALONE).predicted)
