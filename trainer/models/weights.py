"""Files of weights: read without running code from them, and matched with the tensors of a network.

A file holds a state dict, also nested (`state_dict`, `model`, `ema`) or with a prefix (`module.`). Its names are the
network's; those of another implementation are matched by their order, if all shapes agree.
"""

import re
import warnings
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.errors import ConfigError, DataError, list_names

_NESTED_IN = (
    *("state_dict_ema", "model_ema", "ema", "ema_state_dict", "average"),
    *("state_dict", "model", "model_state_dict", "net", "weights"),
)
"""Keys of a training script's checkpoint that hold the network's state dict; averaged weights come first."""
_PREFIXES = ("module.", "_orig_mod.", "network.", "model.", "backbone.")
"""Of names: by DataParallel, torch.compile, Convoy's own checkpoints, Lightning and others."""
_COUNTERS = "num_batches_tracked"
"""Tensors of batch norms that old files lack, and that change nothing."""
_MIN_SHARE = 0.5

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """What of a network came from a file.

    Args:
        file: the file's name.
        num_loaded: tensors that were loaded.
        num_tensors: tensors of the network, without counters.
        by_order: the names differ, and the order decided.
        new: names whose first dimension is another number of classes: they keep their initial weights.
        reshaped: other names that the file has in another shape, or as integers, sparse or without values.
        missing: names of the network that the file lacks.
        unused: names of the file that the network lacks.
    """

    file: str
    num_loaded: int
    num_tensors: int
    by_order: bool
    new: tuple[str, ...]
    reshaped: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]

    def describe(self) -> str:
        """Returns one line for the user."""
        how = ", matched by their order, as the file has other names" if self.by_order else ""
        parts = [f"{self.file}: {self.num_loaded:,} of {self.num_tensors:,} tensors loaded{how}"]
        parts += [f"new: {list_names(self.new)}"] if self.new else []
        parts += [f"of another shape or kind in the file: {list_names(self.reshaped)}"] if self.reshaped else []
        parts += [f"not in the file: {list_names(self.missing)}"] if self.missing else []
        parts += [f"not used: {list_names(self.unused)}"] if self.unused else []
        return "; ".join(parts)


def read_weights(path: Path) -> Weights:
    """Reads a file's state dict. Runs no code from the file.

    Args:
        path: `.safetensors`, or a file that `torch.save` wrote.

    Returns:
        Tensors on the CPU by name, as the file has them.

    Raises:
        DataError: the file cannot be read, or holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch

            content: Any = safetensors.torch.load(path.read_bytes())
        else:
            with path.open("rb") as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a file that another program wrote; the error says enough
                with torch.serialization.safe_globals([Namespace]):  # has the options of timm's script; runs no code
                    content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        cause = " ".join(str(error).split())
        if re.search(r"\bGLOBAL\b|Unsupported class|Trying to (instantiate|call)", cause):
            raise DataError(
                f"{path} holds objects that only code from the file could make, and Convoy runs none: save the "
                "state_dict alone, as torch.save(network.state_dict(), FILE) does"
            ) from error
        if cause.startswith("Weights only load failed") or isinstance(error, EOFError | LookupError):
            cause = "torch.save did not write it"  # what reads it as one says nothing, or a byte that it met
        raise DataError(f"{path} does not hold weights: {cause.partition('. ')[0][:100]}") from error
    weights = _state_dict(content)
    if not weights:
        keys = [str(key) for key in content] if isinstance(content, Mapping) else []
        raise DataError(
            f"{path} does not hold weights: it has no state dict"
            + (f"; its keys are {list_names(keys)}" if keys else "")
        )
    return weights


def load_weights(network: nn.Module, weights: Weights, *, file: str, num_classes: int) -> LoadedWeights:
    """Loads a file's tensors into a network.

    Tensors whose first dimension is `num_classes`, and another number in the file, belong to the head: they keep their
    initial weights.

    Args:
        file: the file's name, for messages.

    Raises:
        DataError: values are not finite.
        ConfigError: fewer than half of the network's other filters and matrices are in the file. Vectors do not count:
            the norms of two networks are often alike.
    """
    mine: Weights = {name: tensor for name, tensor in network.state_dict().items() if isinstance(tensor, torch.Tensor)}
    names, by_order = _match_by_name(mine, weights), False
    if len(names) < _MIN_SHARE * _count(mine):
        in_order = _match_by_order(mine, weights, num_classes)
        names, by_order = (in_order, True) if in_order else (names, False)
    fitting = {name: weights[theirs] for name, theirs in names.items() if _fits(mine[name], weights[theirs])}
    new = [
        name for name in names if name not in fitting and _is_other_head(mine[name], weights[names[name]], num_classes)
    ]
    reshaped = [name for name in names if name not in fitting and name not in new]
    missing = [name for name in mine if name not in names and not name.endswith(_COUNTERS)]
    loaded = LoadedWeights(
        file=file,
        num_loaded=_count(fitting),
        num_tensors=_count(mine),
        by_order=by_order,
        new=tuple(new),
        reshaped=tuple(reshaped),
        missing=tuple(missing),
        unused=tuple(name for name in weights if name not in names.values() and not name.endswith(_COUNTERS)),
    )
    expected = [name for name in mine if mine[name].ndim > 1 and name not in new]
    if sum(name in fitting for name in expected) < _MIN_SHARE * len(expected):
        raise ConfigError(f"these weights are of another network: {loaded.describe()}")
    for name, tensor in fitting.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise DataError(f"{file} holds values of {name} that are not finite: take an earlier file of that training")
    network.load_state_dict(fitting, strict=False)
    return loaded


def _state_dict(content: Any) -> Weights:
    """Returns the tensors of the state dict in a file's content; none where there is no such."""
    if not isinstance(content, Mapping):
        return {}
    best = content.get("best")
    nested = [content.get(key) for key in _NESTED_IN]
    if isinstance(best, Mapping):  # Convoy's, of a recipe that keeps them
        nested.insert(0, best.get("weights"))
    for inner in nested:
        if found := _state_dict(inner):
            return found
    return {str(name): tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}


def _match_by_name(mine: Weights, weights: Weights) -> dict[str, str]:
    """Returns the file's name for each of the network's, after the prefix that gives the most matches is taken off."""
    best: dict[str, str] = {}
    for prefix in ("", *_PREFIXES, *(f"{outer}{inner}" for outer in _PREFIXES for inner in _PREFIXES)):
        found = {name.removeprefix(prefix): name for name in weights if name.startswith(prefix)}
        names = {name: found[name] for name in mine if name in found}
        best = max(best, names, key=len)
    return best


def _match_by_order(mine: Weights, weights: Weights, num_classes: int) -> dict[str, str]:
    """Returns the file's name for each of the network's if both have the same kinds and shapes one after another.

    The last parts of the names (weight, bias, running_mean) must be equal, and the shapes, but for the head's classes.
    """
    ours = [name for name in mine if not name.endswith(_COUNTERS)]
    theirs = [name for name in weights if not name.endswith(_COUNTERS)]
    if len(ours) != len(theirs):
        return {}
    pairs = dict(zip(ours, theirs, strict=True))
    for name, other in pairs.items():
        has_same_kind = name.rpartition(".")[2] == other.rpartition(".")[2]
        has_same_shape = mine[name].shape == weights[other].shape
        if not has_same_kind or not (has_same_shape or _is_other_head(mine[name], weights[other], num_classes)):
            return {}
    return pairs


def _fits(mine: torch.Tensor, other: torch.Tensor) -> bool:
    is_dense = other.layout == torch.strided and not other.is_quantized and not other.is_meta
    return is_dense and other.shape == mine.shape and other.is_floating_point() == mine.is_floating_point()


def _is_other_head(mine: torch.Tensor, other: torch.Tensor, num_classes: int) -> bool:
    is_alike = mine.ndim > 0 and mine.ndim == other.ndim and mine.shape[1:] == other.shape[1:]
    return is_alike and len(mine) == num_classes and len(other) != num_classes


def _count(weights: Weights) -> int:
    return sum(not name.endswith(_COUNTERS) for name in weights)
