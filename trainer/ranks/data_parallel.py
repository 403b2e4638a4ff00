"""Gradients that the ranks add up while the backward pass goes on: torch's DistributedDataParallel, DDP.

`World.uses_ddp` decides where. Everywhere else the gradients are part of one vector (`trainer/loop/shards.py`), which
`World.all_reduce` adds up after the backward pass; docs/decisions/0032 has the reasons.
"""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from trainer.config import GradientReduction
from trainer.ranks.activity import Activity

NUM_EAGER_STEPS = 12
"""Steps before a capture as a CUDA graph: in its first 10 iterations DDP times its kernels, and waits for them."""
NUM_PASSES_TO_ORDER = 2
"""Backward passes after which DDP puts gradients into its buckets in the order in which they come: with a static graph
it only counts them in the first pass, and learns their order in the second."""


def uses_ddp(choice: GradientReduction, device: torch.device, *, size: int, virtual_shards: int | None) -> bool:
    """Returns whether DDP adds up the gradients of a run; else they are added up as one vector.

    Args:
        choice: what the user asks for.
        size: number of ranks.
        virtual_shards: their sum has a fixed order, which DDP leaves to NCCL.
    """
    if size == 1 or virtual_shards is not None or choice == "vector":
        return False
    return choice != "auto" or device.type == "cuda"


class DataParallel:
    """A model as DDP wraps it. For a CUDA graph, make it on the stream of the steps.

    DDP takes the mean over the ranks: multiply losses by the number of ranks for the sum. Parameters that require no
    gradient do not take part, and batch-norm statistics are left alone (`trainer/loop/batch_norm.py`).

    Args:
        model: has the same weights on every rank.
        activity: counts the reductions as collectives.
        compress: the gradients are sent, and added up, as bfloat16.
    """

    def __init__(self, model: nn.Module, activity: Activity, *, compress: bool = False) -> None:
        known = inspect.signature(DistributedDataParallel).parameters
        options: dict[str, Any] = {"init_sync": False}  # `World.broadcast` has done that
        options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
        if "batched_grad_copy" in known:  # torch 2.13: one kernel for the copies into a bucket
            options["batched_grad_copy"] = True
        self._ddp = DistributedDataParallel(model, static_graph=True, gradient_as_bucket_view=True, **options)
        self._ddp._set_ddp_runtime_logging_sample_rate(2**30)  # else also each 100th iteration, maybe within a capture
        if compress:
            self._ddp.register_comm_hook(None, bf16_compress_hook)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._activity = activity
        self._num_sums = 0
        self._has_exchanged_buckets = False
        self.gradients: list[torch.Tensor] = []
        """The memory of the last sum of gradients, which a captured graph writes to."""

    def forward(self, images: torch.Tensor, *, is_last: bool) -> torch.Tensor:
        """Returns the logits of a part of the rank's images.

        Args:
            is_last: the backward pass of this part adds up the gradients of all parts and ranks; every rank has one
                such part in each step.
        """
        # The first forward pass after these backward passes is a collective: rank 0 sends the order of the gradients.
        exchanges = self._num_sums == NUM_PASSES_TO_ORDER and not self._has_exchanged_buckets
        self._has_exchanged_buckets |= exchanges
        with (
            nullcontext() if is_last else self._ddp.no_sync(),
            self._activity.collective() if exchanges else nullcontext(),
        ):
            logits: torch.Tensor = self._ddp(images)
        return logits

    def backward(self, run: Callable[[], None], *, is_last: bool) -> None:
        """Runs the backward pass of the part; after that of the last one, every parameter has its gradient."""
        with self._activity.collective() if is_last else nullcontext():
            run()
        if not is_last:
            return
        self._num_sums += 1
        for parameter in self._parameters:
            if parameter.grad is None:  # the network does not use it
                parameter.grad = torch.zeros_like(parameter)
        self.gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
