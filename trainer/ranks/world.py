"""The ranks of a run: who we are, and everything that is said between us.

The only module that calls collectives of `torch.distributed`. One process without torchrun is a world of size 1, in
which every collective is a no-op and no process group exists.
"""

import datetime
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroup, Store
from torch.distributed.rendezvous import rendezvous as torch_rendezvous

from convoy.cpus import num_available_cpus
from convoy.processes import ignore_signals
from trainer.config import DeviceChoice
from trainer.errors import ConfigError, DesyncError, MismatchError, PeerError, TrainerError
from trainer.ranks.failure import FailureContext, FailureLock, write_error, write_failure
from trainer.ranks.rendezvous import rendezvous
from trainer.ranks.shared_memory import SharedMemoryReducer
from trainer.ranks.watchdog import Watchdog

T = TypeVar("T")
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
    store: Store | None = field(default=None, repr=False)
    """This round's part of torchrun's, which all ranks can read and write; None in a world of one."""
    shared_memory: SharedMemoryReducer | None = field(default=None, repr=False)
    """How vectors on CPUs are added up where all ranks are on one host; None elsewhere."""
    virtual_shards: int | None = None
    """Shards of a global batch if the user has chosen their number, and with it bits that the world size does not
    change. None: one a rank."""
    failure_context: FailureContext = field(default_factory=FailureContext, repr=False)
    """What a report of a failure would say."""
    watchdog: Watchdog = field(default_factory=lambda: Watchdog(FailureContext()), repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def num_computing(self) -> int:
        """Ranks that compute shards, the first ones. The others are spare: they only keep up.

        All, unless an elastic run has just now a number of ranks that does not divide the number of virtual shards.
        """
        if self.virtual_shards is None:
            return self.size
        largest = min(self.size, self.virtual_shards)
        return int(2 ** math.floor(math.log2(largest)))

    @property
    def num_shards(self) -> int:
        """In how many shards a global batch is cut."""
        return self.virtual_shards or self.size

    @classmethod
    @contextmanager
    def join(cls, choice: DeviceChoice, virtual_shards: int | None = None) -> Iterator["World"]:
        """Enter the run that torchrun's environment describes (or be the only rank), and leave it at the end.

        Raises:
            ConfigError: more ranks than GPUs on this host, CUDA asked for where there is none, or a number of ranks
                that does not divide the number of shards.
        """
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if size > 1 and "MASTER_ADDR" not in os.environ:
            raise ConfigError(f"WORLD_SIZE is {size}, but MASTER_ADDR is not set: start the ranks with torchrun")
        # How many threads share a sum decides its rounding; under virtual shards that must not follow from the ranks.
        num_threads = 1 if virtual_shards else max(1, num_available_cpus() // local_size)
        torch.set_num_threads(num_threads)
        if choice != "cpu" and torch.cuda.is_available():
            torch.cuda.init()  # takes seconds in which no thread can give a sign of life: before others listen for one
        failure_context, store, name = FailureContext(rank=rank, world_size=size), None, ""
        watchdog = Watchdog(failure_context)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            watchdog.start()
        if size > 1:
            store, _, _ = next(torch_rendezvous("env://"))
            name = rendezvous(store, rank, size)
            watchdog.meet(store.clone(), name)
        with ExitStack() as links, _watched(failure_context, store, name, watchdog):
            _check_shards(virtual_shards, size)
            device = _choose_device(choice, int(os.environ.get("LOCAL_RANK", 0)), local_size)
            own = PrefixStore(f"convoy/{name}", store) if store is not None else None
            control, shared_memory = None, None
            if own is not None:
                with watchdog.waiting():
                    control = _start_process_group(own, rank, size, device)
                    if size == local_size and device.type == "cpu" and sys.platform == "linux":
                        shared_memory = links.enter_context(closing(SharedMemoryReducer.join(name, rank, size)))
            yield cls(
                rank=rank,
                size=size,
                local_rank=int(os.environ.get("LOCAL_RANK", 0)),
                device=device,
                num_threads=num_threads,
                control=control,
                store=own,
                shared_memory=shared_memory,
                virtual_shards=virtual_shards,
                failure_context=failure_context,
                watchdog=watchdog,
            )

    def broadcast(self, tensors: list[torch.Tensor]) -> None:
        """Make the tensors of every rank those of rank 0."""
        if self.size == 1:
            return
        with self.watchdog.waiting():
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def all_reduce(self, sums: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's vector, the same bits on every rank; in place.

        Under virtual shards the ranks' vectors are added in pairs, then pairs of pairs: the upper part of the tree
        whose lower parts are within the ranks. Each pair adds the same two vectors, and a + b is b + a to the last bit.
        """
        if self.size == 1:
            return sums
        with self.watchdog.waiting():
            if self.shared_memory is not None:
                self.shared_memory.all_reduce(sums, self.num_computing)
            elif self.virtual_shards is None:
                dist.all_reduce(sums)
            else:
                self._all_reduce_in_pairs(sums)
        return sums

    def _all_reduce_in_pairs(self, sums: torch.Tensor) -> None:
        theirs = torch.empty_like(sums)
        distance = 1 if self.rank < self.num_computing else self.size
        while distance < self.num_computing:
            peer = self.rank ^ distance
            exchange = [dist.P2POp(dist.isend, sums, peer), dist.P2POp(dist.irecv, theirs, peer)]
            for work in dist.batch_isend_irecv(exchange):
                work.wait()
            sums.add_(theirs)
            distance *= 2
        if self.num_computing < self.size:
            dist.broadcast(sums, src=0)

    def all_gather(self, numbers: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's `numbers`, int64 on the CPU, in the order of the ranks."""
        if self.size == 1:
            return [numbers]
        boxes = [torch.empty_like(numbers) for _ in range(self.size)]
        with self.watchdog.waiting():
            dist.all_gather(boxes, numbers, group=self.control)
        return boxes

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's `value`, in the order of the ranks."""
        if self.size == 1:
            return [value]
        boxes = [value] * self.size
        with self.watchdog.waiting():
            dist.all_gather_object(boxes, value, group=self.control)
        return boxes

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The element-wise sum of every rank's `tensor`, in place; exact for integers."""
        if self.size > 1:
            with self.watchdog.waiting():
                dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, value: int) -> int:
        """The largest `value` of any rank."""
        if self.size == 1:
            return value
        box = torch.tensor(value)
        with self.watchdog.waiting():
            dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.control)
        return int(box)

    def broadcast_object(self, value: T) -> T:
        """Rank 0's `value`, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        with self.watchdog.waiting():
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def barrier(self) -> None:
        """Return when every rank has come here."""
        if self.size > 1:
            with self.watchdog.waiting():
                dist.barrier(group=self.control)

    def wait_for_ranks(self, ranks: Iterable[int], what: str) -> None:
        """Say that this rank has come to `what` (used once a run), and return when `ranks` have come there too.

        A collective would give up after a time; here each rank may work alone for as long as it takes before it comes,
        and signals are heard meanwhile. Should a rank fail, the watchdog ends this process.

        Raises:
            PeerError: the launcher is gone.
        """
        if self.store is None:
            return
        try:
            self.store.set(f"{what}/{self.rank}", "")
            keys = [f"{what}/{rank}" for rank in ranks]
            while not self.store.check(keys):
                time.sleep(0.05)
        except RuntimeError as error:
            raise PeerError("the launcher is gone") from error


class StopConsensus:
    """A wish of a single rank that all ranks must grant at the same step: to stop.

    The answer to one step's question is collected while the next step computes, so that asking costs no waiting. On the
    CPUs of one host it travels with the next step's sum.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None

    def poll(self, stop_requested: bool) -> bool:
        """After each step's sum: put in this rank's wish; what any rank wished a step ago is granted to all.

        At once in a world of one.
        """
        if self._world.size == 1:
            return stop_requested
        if (shared_memory := self._world.shared_memory) is not None:
            shared_memory.stop_requested = stop_requested
            return shared_memory.stop_agreed
        granted = self._collect()
        self._flag[0] = int(stop_requested)
        with self._world.watchdog.waiting():
            self._pending = dist.all_reduce(self._flag, group=self._world.control, async_op=True)
        return granted

    def close(self) -> None:
        """Wait for the last question, whose answer is not needed any more."""
        self._collect()

    def _collect(self) -> bool:
        if self._pending is None:
            return False
        with self._world.watchdog.waiting():
            self._pending.wait()
        self._pending = None
        return bool(self._flag[0])


def _start_process_group(store: Store, rank: int, size: int, device: torch.device) -> ProcessGroup | None:
    """Start talking; returns the group for control messages where it is not the default one."""
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    if device.type == "cpu":
        return None
    control: ProcessGroup = dist.new_group(backend="gloo")  # type: ignore[assignment]
    return control


@contextmanager
def _watched(failure_context: FailureContext, store: Store | None, name: str, watchdog: Watchdog) -> Iterator[None]:
    """Report what fails, from the rank to whom it is due; leave the process group at the end."""
    is_done = False
    try:
        yield
        is_done = True
    except Exception as error:
        with ignore_signals():
            if store is not None:
                _settle_blame(error, FailureLock(store, name, failure_context.rank), failure_context, watchdog)
            whom = error.ranks if isinstance(error, DesyncError | MismatchError) else [failure_context.rank]
            write_error(failure_context, error, whom)
        raise
    except BaseException:  # a signal, which is no failure: the others leave without asking who is gone
        if store is not None:
            FailureLock(store, name, failure_context.rank).acquire()
        raise
    finally:
        watchdog.stop()
        # NCCL waits there for kernels, which may wait for a rank that is gone: where a run fails, its process ends soon
        # (`cli.py`), and the connections with it.
        if dist.is_initialized() and (is_done or dist.get_backend() != "nccl"):
            dist.destroy_process_group()


def _settle_blame(error: Exception, lock: FailureLock, failure_context: FailureContext, watchdog: Watchdog) -> None:
    """Find out whose failure this is, while the ranks can still talk: the first to claim it tells the user.

    Raises:
        PeerError: another rank failed first, and `error` is only a consequence of it or the same once more.
        TrainerError: a rank has gone without a word, and this one is the first to notice.
    """
    is_consequence = _is_consequence(error, in_collective=error is watchdog.failure)
    if is_consequence and _somebody_claimed(lock, within_s=1.0):
        raise PeerError("another rank failed first") from None
    lost = watchdog.lost_peers() if is_consequence else []
    first = lock.acquire()
    if first != failure_context.rank:
        raise PeerError(f"rank {first} failed first") from None
    if is_consequence:
        whom = f": {' and '.join(watchdog.describe(rank) for rank in lost)}" if lost else ""
        message = (
            f"rank {failure_context.rank} lost another rank{whom}, which was killed or whose host is gone; "
            f"the run can go on from its last checkpoint ({str(error).splitlines()[0]})"
        )
        write_failure(failure_context, message, kind="LostRank", trace=None, ranks=lost)
        raise TrainerError(message) from None


def _somebody_claimed(lock: FailureLock, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if lock.holder() is not None:
                return True
        except (RuntimeError, ValueError):
            return False
        time.sleep(0.05)
    return False


def _is_consequence(error: Exception, *, in_collective: bool) -> bool:
    """Whether an error is what a healthy rank meets when another one has gone.

    NCCL's may come wherever the GPU is waited for; a connection that is lost elsewhere is not one between ranks.
    """
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "NCCL" in str(error)):
        return True
    is_lost = isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "Connection"))
    return in_collective and (is_lost or isinstance(error, ConnectionError))


def _check_shards(virtual_shards: int | None, size: int) -> None:
    # An elastic run cannot choose how many ranks are left when a host goes; those that are too many are spare then.
    is_elastic = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    if virtual_shards and virtual_shards % size and not is_elastic:
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
    # Else cuDNN may add up a filter's gradient in whatever order blocks finish, and a run that goes on after a kill, or
    # on other ranks under virtual shards, would end in other weights.
    torch.backends.cudnn.deterministic = True
    return torch.device("cuda", local_rank)
