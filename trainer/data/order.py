"""Which sample is where: a pure function of seed, epoch and step, never of the number of ranks.

Nothing here has state, so nothing has to be told the epoch (torch's `DistributedSampler.set_epoch`, forgotten in
https://github.com/pytorch/pytorch/issues/31771 and many other places) and nothing has to be saved to resume exactly.
"""

import hashlib

import torch


def generator(purpose: str, seed: int, epoch: int = 0) -> torch.Generator:
    """A CPU generator whose stream depends on its purpose, the run's seed and the epoch, and on nothing else."""
    key = hashlib.blake2b(f"{purpose}/{seed}/{epoch}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little", signed=True))


def epoch_order(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """The permutation in which an epoch visits the samples; int64 `[num_samples]`."""
    return torch.randperm(num_samples, generator=generator("order", seed, epoch))


def dropout_seeds(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """What dropout draws from, for each sample of an epoch: int64 `[num_samples]`, 0 to 2^32 - 1."""
    return torch.randint(2**32, (num_samples,), generator=generator("dropout", seed, epoch))


def num_steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Steps that visit every sample once; the last one may be short."""
    return -(-num_samples // global_batch_size)


def rank_share(num_samples: int, rank: int, world_size: int) -> slice:
    """The part of a batch (or of any range) that belongs to a rank.

    The shares are contiguous, cover the range once, and differ by at most one in length; where there are fewer
    samples than ranks, some are empty.
    """
    return slice(rank * num_samples // world_size, (rank + 1) * num_samples // world_size)
