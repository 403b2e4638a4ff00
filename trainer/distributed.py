"""The ranks of a run: who we are, and everything that is said between us.

The only module that calls collectives of `torch.distributed`. One process without torchrun is a world of size 1, in
which every collective is a no-op and no process group exists.
"""

import datetime
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroup, Store
from torch.distributed.rendezvous import rendezvous

from trainer.errors import ConfigError, Interrupted, PeerError, TrainerError
from trainer.hardware import num_available_cpus
from trainer.virtual_shards import Share, share_of

T = TypeVar("T")
DeviceChoice = Literal["auto", "cpu", "cuda"]
TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process among the ranks of the run."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    num_threads: int
    control: ProcessGroup | None = field(default=None, repr=False)
    """For small agreements that must not wait for the GPU: gloo, on the CPU. None is the default group."""
    virtual_shards: int | None = None
    """Shards of a global batch if the user has chosen their number, and with it bits that the world size does not
    change. None: one a rank."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, num_images: int) -> Share:
        """This rank's part of a global batch."""
        return share_of(num_images, self.rank, self.size, self.virtual_shards or self.size)

    @classmethod
    @contextmanager
    def join(cls, choice: DeviceChoice, virtual_shards: int | None = None) -> Iterator["World"]:
        """Enter the run that torchrun's environment describes (or be the only rank), and leave it at the end.

        Raises:
            ConfigError: more ranks than GPUs on this host, CUDA asked for where there is none, or a number of ranks
                that does not divide the number of shards.
        """
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        # How many threads share a sum decides its rounding; under virtual shards that must not follow from the ranks.
        num_threads = 1 if virtual_shards else max(1, num_available_cpus() // local_size)
        torch.set_num_threads(num_threads)
        if size == 1:
            device = _choose_device(choice, local_rank, local_size)
            yield cls(
                rank=0,
                size=1,
                local_rank=0,
                device=device,
                num_threads=num_threads,
                virtual_shards=virtual_shards,
            )
            return
        store, _, _ = next(rendezvous("env://"))
        try:
            _check_shards(virtual_shards, size)
            device = _choose_device(choice, local_rank, local_size)
            yield cls(
                rank=rank,
                size=size,
                local_rank=local_rank,
                device=device,
                num_threads=num_threads,
                control=_start_process_group(store, rank, size, device),
                virtual_shards=virtual_shards,
            )
        except Interrupted:
            raise
        except Exception as error:
            _settle_blame(error, store, rank)
            raise
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    def copy_from_main(self, tensors: list[torch.Tensor]) -> None:
        """Make the tensors of every rank those of rank 0."""
        if self.size == 1:
            return
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)

    def add_up(self, sums: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's vector, the same bits on every rank; in place.

        Under virtual shards the ranks' vectors are added in pairs, then pairs of pairs: the upper part of the tree
        whose lower parts are within the ranks. Each pair adds the same two vectors, and a + b is b + a to the last bit.
        """
        if self.size == 1:
            return sums
        if self.virtual_shards is None:
            dist.all_reduce(sums)
            return sums
        theirs = torch.empty_like(sums)
        distance = 1
        while distance < self.size:
            peer = self.rank ^ distance
            exchange = [dist.P2POp(dist.isend, sums, peer), dist.P2POp(dist.irecv, theirs, peer)]
            for work in dist.batch_isend_irecv(exchange):
                work.wait()
            sums.add_(theirs)
            distance *= 2
        return sums

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The element-wise sum of every rank's `tensor`, in place; exact for integers."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, value: int) -> int:
        """The largest `value` of any rank."""
        if self.size == 1:
            return value
        box = torch.tensor(value)
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.control)
        return int(box)

    def from_main(self, value: T) -> T:
        """Rank 0's `value`, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def wait_for_all(self) -> None:
        """Return when every rank has come here."""
        if self.size > 1:
            dist.barrier(group=self.control)


class Agreement:
    """Wishes of single ranks that all ranks must grant at the same step: to stop, to save.

    The answer to one step's question is collected while the next step computes, so that asking costs no waiting.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._wishes = torch.zeros(2, dtype=torch.int32)
        self._pending: dist.Work | None = None

    def ask(self, *, stop: bool, save: bool) -> tuple[bool, bool]:
        """Put in this rank's wishes; what any rank wished a step ago (at once in a world of one) is granted to all."""
        if self._world.size == 1:
            return stop, save
        granted = self._collect()
        self._wishes[0], self._wishes[1] = int(stop), int(save)
        self._pending = dist.all_reduce(self._wishes, group=self._world.control, async_op=True)
        return granted

    def close(self) -> None:
        """Wait for the last question, whose answer is not needed any more."""
        self._collect()

    def _collect(self) -> tuple[bool, bool]:
        if self._pending is None:
            return False, False
        self._pending.wait()
        self._pending = None
        return bool(self._wishes[0]), bool(self._wishes[1])


def _start_process_group(store: Store, rank: int, size: int, device: torch.device) -> ProcessGroup | None:
    """Start talking; returns the group for control messages where it is not the default one."""
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("convoy", store),
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    if device.type == "cpu":
        return None
    control: ProcessGroup = dist.new_group(backend="gloo")  # type: ignore[assignment]
    return control


def _settle_blame(error: Exception, store: Store, rank: int) -> None:
    """Find out whose failure this is, while the ranks can still talk: the first to claim it tells the user.

    Raises:
        PeerError: another rank failed first, and `error` is only a consequence of it or the same once more.
        TrainerError: a rank has gone without a word, and this one is the first to notice.
    """
    is_consequence = _is_consequence(error)
    if is_consequence and _somebody_claimed(store, within_s=1.0):
        raise PeerError("another rank failed first") from None
    try:
        first = int(store.compare_set(_failure_key(), "", str(rank)))
    except (RuntimeError, ValueError):  # the launcher, and the store in it, is gone
        first = rank
    if first != rank:
        raise PeerError(f"rank {first} failed first") from None
    if is_consequence:
        raise TrainerError(
            f"rank {rank} lost another rank, which was killed or whose host is gone; the run can go on from its "
            f"last checkpoint ({str(error).splitlines()[0]})"
        ) from None


def _somebody_claimed(store: Store, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if store.check([_failure_key()]):
                return True
        except RuntimeError:
            return False
        time.sleep(0.05)
    return False


def _is_consequence(error: Exception) -> bool:
    """Whether an error is what a healthy rank meets when another one has gone."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "Connection", "NCCL"))
    )


def _failure_key() -> str:
    """One key for each time that torchrun starts the ranks."""
    return f"convoy/first-failure/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _check_shards(virtual_shards: int | None, size: int) -> None:
    if virtual_shards and virtual_shards % size:
        raise ConfigError(
            f"--virtual-shards {virtual_shards} with {size} ranks: the number of ranks must divide it, "
            f"so start 1, 2, 4, … up to {virtual_shards} ranks"
        )


def _choose_device(choice: DeviceChoice, local_rank: int, local_size: int) -> torch.device:
    num_gpus = torch.cuda.device_count() if choice != "cpu" else 0
    if num_gpus == 0:
        if choice == "cuda":
            raise ConfigError("--device cuda: this machine shows no CUDA device; use --device cpu, or mend the driver")
        return torch.device("cpu")
    if local_size > num_gpus:
        raise ConfigError(
            f"--nproc_per_node={local_size}, but this host has {num_gpus} GPU{'s' if num_gpus > 1 else ''}: "
            f"use at most {num_gpus}, or --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
