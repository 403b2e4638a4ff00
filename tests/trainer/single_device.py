"""Finds operations that a CUDA graph cannot hold, without a GPU."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class SingleDeviceMode(TorchDispatchMode):
    """Fails on an operation that reads or creates a tensor on another device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.num_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, results)) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.device == self.device for tensor in tensors), func
        self.num_operations += 1
        return results
