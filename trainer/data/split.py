"""Splits: stratified, a pure function of labels, size and seed; or by content, a function of each image alone."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from trainer.errors import ConfigError

_TENTH = f"{2**256 // 10:064x}"


def stratified_split(labels: torch.Tensor, num_held_out: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits sample indices by class share (largest remainder); every class keeps a sample in the first part.

    Takes int64 [N]; returns kept and held-out indices, int64, sorted. Raises ConfigError for sizes that
    cannot be.
    """
    values, counts = np.unique(labels.numpy(), return_counts=True)
    if seed < 0:
        raise ConfigError(f"a seed must not be negative, and {seed} is")
    if not 0 <= num_held_out <= len(labels) - len(values):
        raise ConfigError(
            f"cannot hold out {num_held_out} of {len(labels)} samples: "
            f"between 0 and {len(labels) - len(values)} leave one for each of {len(values)} classes"
        )
    generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))  # a frozen stream
    held_out = np.zeros(len(labels), dtype=bool)
    for value, share in zip(values, _shares(counts, num_held_out), strict=True):
        members = np.flatnonzero(labels.numpy() == value)
        held_out[generator.permutation(members)[:share]] = True
    return torch.from_numpy(np.flatnonzero(~held_out)), torch.from_numpy(np.flatnonzero(held_out))


def tenth_by_content(digests: Sequence[str], labels: Sequence[int]) -> set[str]:
    """Those of the images' SHA-256 digests, in hex, that are held out: a tenth of all that there could be.

    So an image stays where it is whichever others come and go, and copies of it are on one side. Only a class that has
    none in that tenth gives its first one, and a class that has nothing else keeps its last one.
    """
    classes: dict[int, set[str]] = defaultdict(set)
    for digest, label in zip(digests, labels, strict=True):
        classes[label].add(digest)
    held_out = {digest for digest in digests if digest < _TENTH} | {min(own) for own in classes.values()}
    return held_out - {max(own) for own in classes.values() if own <= held_out}


def _shares(counts: npt.NDArray[np.int64], total: int) -> npt.NDArray[np.int64]:
    """How many of each class: proportional, rounded by largest remainder, and never a whole class."""
    num_samples = max(int(counts.sum()), 1)
    shares = np.minimum(counts * total // num_samples, counts - 1)
    order = np.argsort(-(counts * total % num_samples), kind="stable")
    while (missing := total - int(shares.sum())) > 0:
        with_room = order[shares[order] < counts[order] - 1]
        shares[with_room[:missing]] += 1
    return shares
