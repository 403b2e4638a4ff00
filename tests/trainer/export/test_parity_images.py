"""Tests that validation images come first, in an order that depends on the images alone."""

import torch

from trainer.data import ImageSet
from trainer.export.parity_images import ParityImages

NO_IMAGES = torch.arange(0)


def make_images(number: int) -> ImageSet:
    """Different images whose labels are their indices."""
    images = torch.arange(number, dtype=torch.int32).view(torch.uint8).view(-1, 1, 2, 2).clone()
    return ImageSet(images, torch.arange(number))


def test_validation_images_come_first_then_evenly_spread_training_images() -> None:
    images = make_images(100)
    chosen = ParityImages((images, torch.arange(4)), (images, torch.arange(10, 71)), 10)
    assert (len(chosen), chosen.num_validation) == (10, 4)
    assert sorted(chosen.labels[:4]) == [0, 1, 2, 3]
    assert sorted(chosen.labels[4:]) == [10, 22, 34, 46, 58, 70]
    assert chosen.labels[4:].tolist() != [10, 22, 34, 46, 58, 70]  # shuffled: a folder is sorted by class
    assert [len(batch) for batch in chosen.batches(3, 10)] == [3, 3, 3, 1]
    assert [len(batch) for batch in chosen.batches(6, 8)] == [6, 2]
    pixels = torch.cat(list(chosen.batches(3, 10)))
    assert torch.equal(pixels, images.images[torch.from_numpy(chosen.labels)])
    names = ["validation"] * 4 + ["training"] * 6
    assert [chosen.describe(i) for i in range(10)] == [
        f"{name} image {label}" for name, label in zip(names, chosen.labels, strict=True)
    ]


def test_all_validation_images_are_parity_images() -> None:
    images = make_images(60)
    chosen = ParityImages((images, torch.arange(20)), (images, torch.arange(50, 60)), 10)
    assert sorted(chosen.labels) == list(range(20))


def test_the_order_and_the_digest_depend_on_the_images_and_their_labels_alone() -> None:
    images = make_images(30)
    first = ParityImages((images, torch.arange(20)), (images, NO_IMAGES), 0)
    turned = ImageSet(images.images.flip(0), images.labels.flip(0))
    again = ParityImages((turned, torch.arange(10, 30)), (turned, NO_IMAGES), 0)
    assert again.labels.tolist() == first.labels.tolist() != sorted(first.labels)
    assert again.validation_sha256 == first.validation_sha256
    other_label = ImageSet(images.images, images.labels.clone())
    other_label.labels[7] = 8
    other_pixel = ImageSet(images.images.clone(), images.labels)
    other_pixel.images[7, 0, 0, 0] += 1
    other_shape = ImageSet(images.images.view(-1, 1, 1, 4), images.labels)
    for other in (other_label, other_pixel, other_shape):
        assert (
            ParityImages((other, torch.arange(20)), (other, NO_IMAGES), 0).validation_sha256 != first.validation_sha256
        )
    fewer = ParityImages((images, torch.arange(19)), (images, NO_IMAGES), 0)
    assert fewer.validation_sha256 != first.validation_sha256
