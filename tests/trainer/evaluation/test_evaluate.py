"""Whole numbers, every image once."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from trainer.data import ImageSet
from trainer.evaluation.evaluate import (
    CHUNK_SIZE,
    Evaluation,
    average_views,
    describe_accuracy,
    evaluate,
    interval_of_look,
    level_of_look,
    wilson_interval,
)
from trainer.ranks.world import World

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), num_threads=1)


def _labelled(num_images: int) -> ImageSet:
    generator = torch.Generator().manual_seed(num_images)
    images = torch.randint(0, 256, (num_images, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.randint(0, 5, (num_images,), generator=generator))


def _first_pixels(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.flatten(1)[:, :5].float() / 50


@given(num_images=st.sampled_from([1, 2, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 3 * CHUNK_SIZE + 7]))
def test_it_equals_the_plain_computation(num_images: int) -> None:
    images = _labelled(num_images)
    seen = evaluate(_first_pixels, images, None, ALONE)
    logits = _first_pixels(images.images)
    assert torch.equal(seen.predicted, logits.argmax(dim=1))
    assert seen.num_errors == int((logits.argmax(dim=1) != images.labels).sum())
    assert seen.num_images == num_images
    assert seen.loss == pytest.approx(F.cross_entropy(logits, images.labels).item(), rel=1e-5)
    chances = logits.softmax(dim=1)
    assert torch.allclose(seen.confidence, chances.max(dim=1).values)
    assert torch.allclose(seen.label_probability, chances.gather(1, images.labels[:, None])[:, 0])


@given(world_size=st.integers(min_value=1, max_value=9))
def test_the_ranks_compute_each_image_once(world_size: int) -> None:
    images = _labelled(4 * CHUNK_SIZE + 3)
    seen: list[torch.Tensor] = []

    def predict(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(pixels)
        return _first_pixels(pixels)

    class NoSum(World):
        def sum(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor

    for rank in range(world_size):
        world = NoSum(rank=rank, size=world_size, local_rank=rank, device=torch.device("cpu"), num_threads=1)
        evaluate(predict, images, None, world)
    assert sum(map(len, seen)) == len(images.labels)
    assert torch.equal(torch.cat(seen).flatten(1).sum(dim=0), images.images.flatten(1).sum(dim=0))


def test_only_the_asked_images_are_evaluated() -> None:
    images = _labelled(100)
    indices = torch.tensor([3, 50, 7])
    seen = evaluate(_first_pixels, images, indices, ALONE)
    assert torch.equal(seen.labels, images.labels[indices])
    assert torch.equal(seen.predicted, _first_pixels(images.images[indices]).argmax(dim=1))


def test_the_confusion_matrix_has_labels_in_rows() -> None:
    labels, predicted = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 0])
    chances = torch.ones(4)
    seen = Evaluation(labels=labels, predicted=predicted, confidence=chances, label_probability=chances, loss=0.0)
    assert seen.confusion(3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert seen.accuracy == 0.5


def test_nothing_right_of_nothing_is_no_success() -> None:
    none = torch.empty(0)
    seen = Evaluation(labels=none, predicted=none, confidence=none, label_probability=none, loss=0.0)
    assert seen.accuracy == 0
    assert describe_accuracy(0, 0) == describe_accuracy(0, 0, 1) == "unknown (no images)"


def test_views_are_averaged_with_their_weights() -> None:
    pixels = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def model(batch: torch.Tensor) -> torch.Tensor:
        return batch.float().flatten(1)[:, :7]

    mirrored = (model(pixels) + model(pixels.flip(-1))) / 2
    assert torch.allclose(average_views(model, pixels, "one"), model(pixels))
    assert torch.allclose(average_views(model, pixels, "mirrored"), mirrored)
    padded = F.pad(pixels.float(), (1, 1, 1, 1), mode="reflect")
    near = [padded[..., :8, 1:9], padded[..., 2:, 1:9], padded[..., 1:9, :8], padded[..., 1:9, 2:]]
    weighted = (2 * model(pixels) + sum(map(model, near))) / 6
    assert torch.allclose(average_views(model, pixels, "shifted"), weighted)
    corners = [padded[..., :8, :8], padded[..., 2:, 2:]]
    shifted = sum((model(corner) + model(corner.flip(-1))) / 2 for corner in corners) / 2
    assert torch.allclose(average_views(model, pixels, "mirrored-and-shifted"), (mirrored + shifted) / 2)


def test_wilsons_interval_is_wilsons() -> None:
    low, high = wilson_interval(9900, 10000)
    assert (low, high) == (pytest.approx(0.98786, abs=2e-5), pytest.approx(0.99177, abs=2e-5))
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)
    assert wilson_interval(0, 10)[0] == pytest.approx(0.0)
    plain = "99.00 % (100 of 10,000 wrong; 95 % interval 98.79 to 99.18 %)"
    assert describe_accuracy(100, 10000) == plain


def test_the_intervals_of_all_looks_share_five_percent() -> None:
    shares = [1 - level_of_look(look) for look in range(1, 100_001)]
    assert sum(shares) == pytest.approx(0.05, abs=1e-6)
    assert sum(shares) < 0.05
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == pytest.approx(0.030396, abs=1e-6)
    low, high = interval_of_look(9900, 10000, 1)
    assert (low, high) == pytest.approx(wilson_interval(9900, 10000, z=2.164887), abs=1e-6)
    wide = interval_of_look(9900, 10000, 10)
    assert wide == pytest.approx(wilson_interval(9900, 10000, z=3.611898), abs=1e-6)
    assert "; interval 98.57 to 99.30 %, 95 % over all looks)" in describe_accuracy(100, 10000, 10)
