"""The order of samples: a pure function of seed, epoch and step, whatever the number of ranks.

Nothing here has state, so there is no `set_epoch` to forget, as with torch's `DistributedSampler`
(https://github.com/pytorch/pytorch/issues/31771), and nothing to save for an exact resume.
"""

import hashlib

import torch


def generator(purpose: str, seed: int, epoch: int = 0) -> torch.Generator:
    """Returns a CPU generator whose stream depends on nothing but purpose, seed and epoch."""
    key = hashlib.blake2b(f"{purpose}/{seed}/{epoch}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little", signed=True))


def epoch_order(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """Returns the permutation in which an epoch visits the samples, int64 `[num_samples]`."""
    return torch.randperm(num_samples, generator=generator("order", seed, epoch))


def dropout_seeds(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """Returns the seed of dropout for each sample of an epoch, int64 `[num_samples]`, 0 to 2^32 - 1."""
    return torch.randint(2**32, (num_samples,), generator=generator("dropout", seed, epoch))


def num_steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Returns the number of steps that visit every sample once; the last step may have a smaller batch."""
    return -(-num_samples // global_batch_size)


def rank_share(num_samples: int, rank: int, world_size: int) -> slice:
    """Returns the slice of a batch, or of any range, that belongs to a rank.

    The slices are contiguous, cover the range once, and differ by at most one in length. With fewer samples than
    ranks, some are empty.
    """
    return slice(rank * num_samples // world_size, (rank + 1) * num_samples // world_size)
