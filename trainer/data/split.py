"""Splits of a data set.

`stratified_split` is a pure function of labels, size and seed; `hash_split` decides for each image by its own content.
"""

import numpy as np
import numpy.typing as npt
import torch

from trainer.errors import ConfigError

_TENTH = np.bytes_((2**256 // 10).to_bytes(32, "big"))


def stratified_split(labels: torch.Tensor, num_held_out: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Holds samples out in proportion to the classes (largest remainder), and keeps at least one of each class.

    Args:
        labels: int64 [N].
        num_held_out: number of samples to hold out.
        seed: chooses the samples.

    Returns:
        Indices of the kept and of the held-out samples, int64, sorted.

    Raises:
        ConfigError: the seed is negative, or so many samples cannot be held out.
    """
    values, counts = np.unique(labels.numpy(), return_counts=True)
    if seed < 0:
        raise ConfigError(f"a seed must not be negative, and {seed} is")
    if not 0 <= num_held_out <= len(labels) - len(values):
        raise ConfigError(
            f"{num_held_out} of {len(labels)} images cannot be held out: each of {len(values)} classes must keep one; "
            "there are too few images"
        )
    generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))  # its stream is frozen
    held_out = np.zeros(len(labels), dtype=bool)
    for value, share in zip(values, _shares(counts, num_held_out), strict=True):
        members = np.flatnonzero(labels.numpy() == value)
        held_out[generator.permutation(members)[:share]] = True
    return torch.from_numpy(np.flatnonzero(~held_out)), torch.from_numpy(np.flatnonzero(held_out))


def hash_split(digests: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Holds out the images whose digest is in the lowest tenth of all possible digests.

    An image stays in its split whichever others are added or removed, and its duplicates are in the same one. A class
    without a digest in that tenth holds out its lowest one; a class with no other digests keeps its highest one.

    Args:
        digests: SHA-256 of each image, [N, 32].
        labels: the class of each image, [N].

    Returns:
        Whether each image is held out, [N].
    """
    distinct, numbers = np.unique(as_strings(digests), return_inverse=True)  # in ascending order
    order = np.lexsort((numbers, labels))
    is_first = np.diff(labels[order], prepend=-1) != 0  # of its class
    lowest, highest = numbers[order[is_first]], numbers[order[np.roll(is_first, -1)]]
    held_out = distinct < _TENTH
    held_out[lowest] = True
    num_kept = np.add.reduceat(~held_out[numbers[order]], np.flatnonzero(is_first)) if len(labels) else 0
    held_out[highest[num_kept == 0]] = False
    return held_out[numbers]


def as_strings(digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.bytes_]:
    """Returns digests, uint8 [N, 32], as one value each that NumPy compares and sorts."""
    return np.ascontiguousarray(digests).view("S32")[:, 0]


def _shares(counts: npt.NDArray[np.int64], total: int) -> npt.NDArray[np.int64]:
    """Returns how many to hold out of each class: in proportion, by largest remainder, and never a whole class."""
    num_samples = max(int(counts.sum()), 1)
    shares = np.minimum(counts * total // num_samples, counts - 1)
    order = np.argsort(-(counts * total % num_samples), kind="stable")
    while (missing := total - int(shares.sum())) > 0:
        with_room = order[shares[order] < counts[order] - 1]
        shares[with_room[:missing]] += 1
    return shares
