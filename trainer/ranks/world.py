"""The ranks of a run, and the collectives between them.

Only this room calls collectives of `torch.distributed`. One process without torchrun is a world of size 1, in which
every collective is a no-op and no process group exists.
"""

import datetime
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroup, Store

from convoy.cpus import num_available_cpus
from trainer.config import DeviceChoice, GradientReduction
from trainer.errors import ConfigError
from trainer.ranks.activity import HANG_TIMEOUT_S, Activity
from trainer.ranks.data_parallel import DataParallel, uses_ddp
from trainer.ranks.device import choose_device
from trainer.ranks.environment import RankEnvironment, warn_of_separate_tasks
from trainer.ranks.failure import FailureContext, FailureLock, report_failure
from trainer.ranks.rendezvous import connect, join_round
from trainer.ranks.shared_memory import SharedMemoryReducer
from trainer.ranks.waiting import announced
from trainer.ranks.watchdog import DETECT_EVERY_S, Watchdog

T = TypeVar("T")
COLLECTIVE_TIMEOUT_S = 600.0
"""After this long a collective of torch's fails by itself. The watchdog ends most runs that hang much sooner."""
NO_TIMEOUT_S = 20 * 86400.0
"""Its timeout if ranks may wait for ever, for example for a debugger: 31 bits of milliseconds end after 24 days."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process among the ranks of the run.

    Args:
        num_threads: threads that share an operation on the CPU.
        num_cpus: this rank's share of the host's CPUs.
        control: process group for small messages that must not wait for the GPU: gloo, on the CPU. None is the default
            group.
        store: torchrun's store, under the round's prefix; None in a world of size 1.
        shared_memory: adds up vectors if all ranks compute on the CPUs of one host; None elsewhere.
        virtual_shards: number of shards of a global batch, if the user chose it to get the same bits with any world
            size. None: as many for each rank as `grad_accumulation` says.
        grad_accumulation: least number of parts in which a rank computes its share of a batch.
        gradient_reduction: the way that the user wants the gradients to be added up.
        failure_context: the context of a failure report, which the run keeps up to date.
        activity: reports what this rank is doing, for the watchdogs of all ranks.
        on_leave: closed when this rank leaves the run, however it ends.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    num_threads: int
    num_cpus: int = 1
    control: ProcessGroup | None = field(default=None, repr=False)
    store: Store | None = field(default=None, repr=False)
    shared_memory: SharedMemoryReducer | None = field(default=None, repr=False)
    virtual_shards: int | None = None
    grad_accumulation: int = 1
    gradient_reduction: GradientReduction = "auto"
    failure_context: FailureContext = field(default_factory=FailureContext, repr=False)
    activity: Activity = field(default_factory=Activity, repr=False)
    watchdog: Watchdog = field(default_factory=lambda: Watchdog(FailureContext(), Activity()), repr=False)
    on_leave: ExitStack = field(default_factory=ExitStack, repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def num_computing(self) -> int:
        """Number of ranks that compute shards: the first ones. Extra ranks stay in sync as spares.

        All ranks compute, unless an elastic run has lost hosts and its world size no longer divides the number of
        virtual shards.
        """
        if self.virtual_shards is None:
            return self.size
        largest = min(self.size, self.virtual_shards)
        return int(2 ** math.floor(math.log2(largest)))

    @property
    def num_shards(self) -> int:
        """Number of shards of a global batch."""
        return self.virtual_shards or self.size * self.grad_accumulation

    @property
    def uses_ddp(self) -> bool:
        """Whether DDP adds up the gradients; else they are part of the vector for `all_reduce`."""
        return uses_ddp(self.gradient_reduction, self.device, size=self.size, virtual_shards=self.virtual_shards)

    @classmethod
    @contextmanager
    def join(
        cls,
        choice: DeviceChoice,
        virtual_shards: int | None = None,
        *,
        grad_accumulation: int = 1,
        gradient_reduction: GradientReduction = "auto",
        hang_timeout_s: float = HANG_TIMEOUT_S,
        allow_shared_gpu: bool = False,
    ) -> Iterator["World"]:
        """Joins the run that the launcher's variables describe, or becomes its only rank; leaves it at the end.

        Args:
            hang_timeout_s: least time that the ranks wait for one that hangs (see `Activity`); 0 for ever.
            allow_shared_gpu: several ranks may compute on one GPU.

        Raises:
            ConfigError: the variables contradict each other, there are more ranks than GPUs on this host, CUDA where
                there is none, a number of ranks that does not divide the number of virtual shards, or too few of these
                for `grad_accumulation`.
            TrainerError: the other ranks do not start.
        """
        environment = RankEnvironment.read()
        rank, size = environment.rank, environment.world_size
        local_rank, local_size = environment.local_rank, environment.local_world_size
        if not environment.is_launched and (warning := warn_of_separate_tasks()):
            print(warning, file=sys.stderr, flush=True)
        # The number of threads that share a sum decides its rounding; under virtual shards it must not depend on ranks.
        num_cpus = max(1, num_available_cpus() // local_size)
        num_threads = 1 if virtual_shards else min(num_cpus, environment.num_threads or num_cpus)
        torch.set_num_threads(num_threads)
        if choice != "cpu" and torch.cuda.is_available():
            torch.cuda.init()  # takes seconds in which no thread sends heartbeats: before others expect them
        context = FailureContext(rank=rank, world_size=size, attempt=environment.num_restarts)
        activity = Activity(hang_timeout_s)
        watchdog = Watchdog(context, activity)
        with ExitStack() as on_leave, _in_round(environment, context, watchdog) as (store, round_name):
            _check_shards(virtual_shards, size, grad_accumulation, is_elastic=environment.max_restarts > 0)
            device = choose_device(choice, environment, allow_shared_gpu=allow_shared_gpu)
            control, shared_memory = None, None
            if store is not None:
                with activity.collective(), announced(watchdog.describe_wait):
                    control = _init_process_group(store, rank, size, device, hang_timeout_s)
                    if environment.has_one_host and device.type == "cpu" and sys.platform == "linux":
                        shared_memory = SharedMemoryReducer.join(round_name, rank, size)
                        on_leave.enter_context(closing(shared_memory))
            yield cls(
                rank=rank,
                size=size,
                local_rank=local_rank,
                device=device,
                num_threads=num_threads,
                num_cpus=num_cpus,
                control=control,
                store=store,
                shared_memory=shared_memory,
                virtual_shards=virtual_shards,
                grad_accumulation=grad_accumulation,
                gradient_reduction=gradient_reduction,
                failure_context=context,
                activity=activity,
                watchdog=watchdog,
                on_leave=on_leave,
            )

    def data_parallel(self, model: nn.Module) -> DataParallel:
        """Wraps a model so that DDP adds up its gradients."""
        return DataParallel(model, self.activity, compress=self.gradient_reduction == "ddp-bfloat16")

    def broadcast(self, tensors: list[torch.Tensor]) -> None:
        """Copies rank 0's tensors to every rank, in place."""
        if self.size == 1:
            return
        with self.activity.collective():
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def all_reduce(self, sums: torch.Tensor) -> torch.Tensor:
        """Returns the sum of every rank's vector, the same bits on every rank; in place.

        Under virtual shards the ranks' vectors are added in pairs, then pairs of pairs: the upper part of the tree
        whose lower parts are within the ranks. Each pair adds the same two vectors, and a + b equals b + a bit by bit.
        """
        if self.size == 1:
            return sums
        with self.activity.collective():
            if self.shared_memory is not None:
                self.shared_memory.all_reduce(sums, self.num_computing)
            elif self.virtual_shards is None:
                dist.all_reduce(sums)
            else:
                self._all_reduce_in_pairs(sums)
        return sums

    def _all_reduce_in_pairs(self, sums: torch.Tensor) -> None:
        received = torch.empty_like(sums)
        distance = 1 if self.rank < self.num_computing else self.size
        while distance < self.num_computing:
            peer = self.rank ^ distance
            exchange = [dist.P2POp(dist.isend, sums, peer), dist.P2POp(dist.irecv, received, peer)]
            for work in dist.batch_isend_irecv(exchange):
                work.wait()
            sums.add_(received)
            distance *= 2
        if self.num_computing < self.size:
            dist.broadcast(sums, src=0)

    def all_gather(self, numbers: torch.Tensor) -> list[torch.Tensor]:
        """Returns every rank's `numbers`, int64 on the CPU, in the order of the ranks."""
        if self.size == 1:
            return [numbers]
        gathered = [torch.empty_like(numbers) for _ in range(self.size)]
        with self.activity.collective():
            dist.all_gather(gathered, numbers, group=self.control)
        return gathered

    def all_gather_object(self, value: T) -> list[T]:
        """Returns every rank's `value`, in the order of the ranks."""
        if self.size == 1:
            return [value]
        gathered = [value] * self.size
        with self.activity.collective():
            dist.all_gather_object(gathered, value, group=self.control)
        return gathered

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the element-wise sum of every rank's `tensor`, on the CPU; overwrites it. Exact for integers."""
        if self.size == 1:
            return tensor.cpu()
        with self.activity.collective():
            dist.all_reduce(tensor)
            return tensor.cpu()  # NCCL's call only queues the sum: this waits for the other ranks

    def all_reduce_max(self, value: int) -> int:
        """Returns the largest `value` of any rank."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        with self.activity.collective():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return int(tensor)

    def broadcast_object(self, value: T) -> T:
        """Returns rank 0's `value`, on every rank."""
        if self.size == 1:
            return value
        objects = [value]
        with self.activity.collective():
            dist.broadcast_object_list(objects, src=0, group=self.control)
        return objects[0]

    def barrier(self) -> None:
        """Returns when every rank has called this."""
        if self.size > 1:
            with self.activity.collective():
                dist.barrier(group=self.control)

    def untimed_barrier(self, name: str, *, what: str = "") -> None:
        """Returns when every rank has called this with the same name, however long that takes.

        A collective fails after a while. Here ranks may work alone for hours before they arrive, and the waiting ranks
        handle signals. If a rank fails, the watchdog ends the waiting ones.

        Args:
            name: unique within the run.
            what: the work of the missing ranks, for a line that tells the user about the wait; "" for no such line.

        Raises:
            RuntimeError: the store is gone.
        """
        if self.store is None:
            return
        store = self.store

        def describe() -> str:
            arrived = [rank for rank in range(self.size) if store.check([f"{name}/arrived/{rank}"])]
            if not what or arrived[0] != self.rank:  # the lowest rank that waits tells the user
                return ""
            missing = [rank for rank in range(self.size) if rank not in arrived]
            return f"rank {self.rank} waits for {self.watchdog.describe(missing)} to {what}" if missing else ""

        try:
            with announced(describe):
                store.set(f"{name}/arrived/{self.rank}", "")
                if store.add(f"{name}/arrived", 1) == self.size:
                    store.set(f"{name}/complete", "")
                while not store.check([f"{name}/complete"]):
                    time.sleep(0.05)
                store.add(f"{name}/left", 1)
                # Rank 0 goes last: without torchrun it serves the store, which ends with its process.
                while self.is_main and store.add(f"{name}/left", 0) < self.size:
                    time.sleep(0.05)
        except RuntimeError:
            time.sleep(2 * DETECT_EVERY_S)  # if this rank's own launcher is gone, the watchdog ends the rank
            raise


@contextmanager
def _in_round(
    environment: RankEnvironment, context: FailureContext, watchdog: Watchdog
) -> Iterator[tuple[Store | None, str]]:
    """Context of this rank's part in a round: it is watched, its failure is reported, and it leaves at the end.

    Yields:
        The store under the round's prefix, None for a single rank, and the name of the round.
    """
    if environment.is_torchrun:
        watchdog.watch_launcher()
    store, lock, name = None, None, ""
    if environment.world_size > 1:
        store, lock, name = _join_round(environment, watchdog)
    with _leaving(watchdog), report_failure(context, lock, watchdog):
        yield store, name


def _join_round(environment: RankEnvironment, watchdog: Watchdog) -> tuple[Store, FailureLock, str]:
    """Connects to the run's store, waits for all ranks and starts to watch them.

    Returns:
        The store under the round's prefix, the round's failure lock, and its name.
    """
    shared_store = connect(environment)
    watchdog_store = shared_store.clone()  # may take seconds, in which the others would miss heartbeats
    name = join_round(shared_store, environment)
    lock = watchdog.watch_peers(watchdog_store, name)
    return PrefixStore(f"convoy/{name}", shared_store), lock, name


def _init_process_group(
    store: Store, rank: int, size: int, device: torch.device, hang_timeout_s: float
) -> ProcessGroup | None:
    """Connects the ranks; returns the group for control messages, or None if it is the default group."""
    timeout_s = max(COLLECTIVE_TIMEOUT_S, hang_timeout_s) if hang_timeout_s else NO_TIMEOUT_S
    timeout = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    if device.type == "cpu":
        return None
    control: ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)  # type: ignore[assignment]
    return control


@contextmanager
def _leaving(watchdog: Watchdog) -> Iterator[None]:
    """Stops the watchdog and leaves the process group at the end."""
    has_failed = True
    try:
        yield
        has_failed = False
    finally:
        watchdog.stop()
        # NCCL would wait for kernels, which may wait for a rank that is gone. The process of a failed run ends soon
        # (`trainer/cli.py`), and its connections with it.
        if dist.is_initialized() and not (has_failed and dist.get_backend() == "nccl"):
            dist.destroy_process_group()


def _check_shards(virtual_shards: int | None, size: int, grad_accumulation: int, *, is_elastic: bool) -> None:
    # An elastic run cannot choose how many ranks remain when it loses a host; extra ranks are spares then.
    if virtual_shards and virtual_shards % size and not is_elastic:
        raise ConfigError(
            f"--virtual-shards {virtual_shards} with {size} ranks: the number of ranks must divide it, "
            f"so start 1, 2, 4, … up to {virtual_shards} ranks"
        )
    if virtual_shards and grad_accumulation > 1 and virtual_shards < size * grad_accumulation:
        raise ConfigError(
            f"--grad-accumulation {grad_accumulation} with --virtual-shards {virtual_shards} and {size} "
            f"rank{'s' if size > 1 else ''}: a rank computes one virtual shard after another; give at least "
            f"{size * grad_accumulation} of them"
        )
