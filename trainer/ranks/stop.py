"""Agreement on the step after which all ranks stop."""

import torch
import torch.distributed as dist

from trainer.ranks.world import World


class StopConsensus:
    """Makes all ranks stop at the same step if any received a signal.

    The ranks agree on one step's requests while they compute the next step, so that no rank waits. Ranks that add up in
    shared memory send the requests along with the next step's sum.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None

    def poll(self, stop_requested: bool) -> bool:
        """Submits this rank's request; all ranks call this after each step's sum.

        Returns:
            Whether any rank requested a stop at the step before, the same on every rank. For a single rank: whether it
            requests one now.
        """
        if self._world.size == 1:
            return stop_requested
        if (shared_memory := self._world.shared_memory) is not None:
            shared_memory.stop_requested = stop_requested
            return shared_memory.stop_agreed
        agreed = self._collect()
        self._flag[0] = int(stop_requested)
        with self._world.activity.collective():
            self._pending = dist.all_reduce(self._flag, group=self._world.control, async_op=True)
        return agreed

    def close(self) -> None:
        """Waits for the last step's requests, which are ignored."""
        self._collect()

    def _collect(self) -> bool:
        if self._pending is None:
            return False
        with self._world.activity.collective():
            self._pending.wait()
        self._pending = None
        return bool(self._flag[0])
