"""What must be the same on every rank before they train together, and how to tell the user that it is not."""

import hashlib
import platform
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path

import torch

import convoy
import trainer
from trainer.errors import DesyncError, MismatchError
from trainer.hardware import bfloat16_instructions

CODE = tuple(Path(package.__file__).parent for package in (convoy, trainer) if package.__file__)
"""The packages whose code decides what a run computes, whole."""


def code_sha256(packages: Sequence[Path] = CODE) -> str:
    """SHA-256 over the names and contents of the packages' sources, as they lie on the disk, committed or not."""
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted(package.rglob("*.py")):
            digest.update(f"{package.name}/{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def processor(device: torch.device) -> str:
    """The kind of processor, as far as it decides the rounding."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return " ".join([platform.machine(), torch.backends.cpu.get_cpu_capability(), *bfloat16_instructions()])


def check_same(identities: Sequence[dict[str, str]]) -> None:
    """Compare what the ranks said of themselves; all say the same things.

    Raises:
        MismatchError: they differ; each value that is not the most ranks' is named with its ranks.
    """
    for name in identities[0]:
        values = [identity[name] for identity in identities]
        odd = odd_ones_out(values)
        if odd:
            by_value = {value: [rank for rank, theirs in enumerate(values) if theirs == value] for value in values}
            said = [
                f"{name_ranks(ranks)} {'has' if len(ranks) == 1 else 'have'} {value:.60}"
                for value, ranks in by_value.items()
                if ranks[0] in odd
            ]
            said += [f"the others {value:.60}" for value, ranks in by_value.items() if ranks[0] not in odd]
            raise MismatchError(f"{name} differs between ranks: {', '.join(said)}; start every rank with the same", odd)


def check_weights(digests: Sequence[tuple[int, ...]], step: int) -> None:
    """Compare digests of the ranks' weights.

    Raises:
        DesyncError: they differ.
    """
    odd = odd_ones_out(digests)
    if odd:
        who = f"{name_ranks(odd)} {'is' if len(odd) == 1 else 'are'} not like the others"
        if len(odd) == len(digests):
            who = f"{name_ranks(odd)} do not agree, and no more than half of them are alike"
        raise DesyncError(
            f"the ranks' weights differ at step {step}: {who}; "
            "it may be the hardware: the run can go on from its last checkpoint",
            odd,
        )


def odd_ones_out(values: Sequence[Hashable]) -> list[int]:
    """The positions whose value is not that of more than half; all of them where no value is."""
    (common, count), *_ = Counter(values).most_common(1)
    return [position for position, value in enumerate(values) if value != common or 2 * count <= len(values)]


def name_ranks(ranks: Sequence[int]) -> str:
    """`rank 2`, or `ranks 2, 3`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def digest_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Two int64 numbers that change with any bit of float32 or int64 `tensors`, computed on their device.

    A sum and a weighted sum of the bits, so that values that change places are seen too. Not for adversaries.
    """
    flat = torch.cat([tensor.detach().contiguous().flatten().view(torch.int32) for tensor in tensors])
    places = torch.arange(1, 2 * len(flat), 2, dtype=torch.int32, device=flat.device)
    return torch.stack([flat.sum(), (flat * places).sum()])
