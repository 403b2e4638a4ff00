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


def balanced_order(labels: torch.Tensor, seed: int, epoch: int) -> torch.Tensor:
    """Returns an order in which each class has the same share of an epoch, up to one sample, int64 `[N]`.

    The samples of a large class are drawn without replacement; those of a small class all come equally often, up to
    one time. Classes without samples have no share.

    Args:
        labels: int64 `[N]`, of the samples.
    """
    random = generator("balanced-order", seed, epoch)
    members = labels.argsort(stable=True).split(labels.unique(return_counts=True)[1].tolist())
    sizes = torch.full((len(members),), len(labels) // len(members))
    sizes[torch.randperm(len(members), generator=random)[: len(labels) % len(members)]] += 1
    chosen = []
    for mine, size in zip(members, sizes.tolist(), strict=True):
        num_rounds = -(-size // len(mine))
        rounds = torch.rand(num_rounds, len(mine), generator=random).argsort(dim=1)
        chosen.append(mine[rounds.flatten()[:size]])
    return torch.cat(chosen)[torch.randperm(len(labels), generator=random)]


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
