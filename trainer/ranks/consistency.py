"""Checks that all ranks run the same code with the same settings, and keep the same weights."""

import hashlib
import platform
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import torch

import convoy
import trainer
from trainer.errors import DesyncError, MismatchError
from trainer.hardware import bfloat16_instructions
from trainer.kernels.choice import unsupported_reason
from trainer.ranks.waiting import name_numbers

CODE = tuple(Path(package.__file__).parent for package in (convoy, trainer) if package.__file__)
"""The folders of the packages whose code decides what a run computes."""


def code_sha256(packages: Sequence[Path] = CODE) -> str:
    """Returns the SHA-256 over the names and contents of the packages' sources on the disk, committed or not."""
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted(package.rglob("*.py")):
            digest.update(f"{package.name}/{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def processor(device: torch.device) -> str:
    """Returns the kind of processor, as far as it decides the rounding."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return name if unsupported_reason(device) is None else f"{name}, without Triton kernels"
    return " ".join([platform.machine(), torch.backends.cpu.get_cpu_capability(), *bfloat16_instructions()])


def check_same(identities: Sequence[Mapping[str, str]]) -> None:
    """Checks that all ranks describe themselves with the same values.

    Args:
        identities: for each rank, the values by name; every rank has the same names.

    Raises:
        MismatchError: they differ. Names each value that is not the majority's, and its ranks.
    """
    for name in identities[0]:
        values = [identity[name] for identity in identities]
        differing = minority_positions(values)
        if differing:
            ranks_of = {value: [rank for rank, other in enumerate(values) if other == value] for value in values}
            parts = [
                f"{name_numbers('rank', ranks)} {'has' if len(ranks) == 1 else 'have'} {value:.60}"
                for value, ranks in ranks_of.items()
                if ranks[0] in differing
            ]
            parts += [f"the others {value:.60}" for value, ranks in ranks_of.items() if ranks[0] not in differing]
            raise MismatchError(
                f"{name} differs between ranks: {', '.join(parts)}; start every rank with the same", differing
            )


def check_weights(digests: Sequence[tuple[int, ...]], step: int) -> None:
    """Checks that the ranks' weights have the same digest.

    Args:
        digests: for each rank, the digest of its weights (see `digest_of`).

    Raises:
        DesyncError: they differ.
    """
    differing = minority_positions(digests)
    if differing:
        which = f"{name_numbers('rank', differing)} differ{'s' if len(differing) == 1 else ''} from the others"
        if len(differing) == len(digests):
            which = f"{name_numbers('rank', differing)} disagree, and no majority has the same weights"
        raise DesyncError(
            f"the ranks' weights differ at step {step}: {which}; "
            "the hardware may be faulty; the run can continue from its last checkpoint",
            differing,
        )


def minority_positions(values: Sequence[Hashable]) -> list[int]:
    """Returns the positions of the values that differ from the majority's; all, if no value has a majority."""
    (common, count), *_ = Counter(values).most_common(1)
    return [position for position, value in enumerate(values) if value != common or 2 * count <= len(values)]


def digest_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns a digest that changes with any bit of `tensors`: the sum and a weighted sum of their 32-bit words.

    The weighted sum changes when values swap places. Not safe against an adversary.

    Args:
        tensors: float32 or int64, on one device.

    Returns:
        int64 `[2]` on that device.
    """
    words = torch.cat([tensor.detach().contiguous().flatten().view(torch.int32) for tensor in tensors])
    weights = torch.arange(1, 2 * len(words), 2, dtype=torch.int32, device=words.device)
    return torch.stack([words.sum(), (words * weights).sum()])
