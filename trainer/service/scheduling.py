"""Which queued jobs start on a machine now. A pure function of the queue, the running jobs and the machine.

Jobs of a higher priority come first, and equal ones in the order of their numbers. A job behind one that does not fit
yet starts only if it cannot delay that one, in whatever order the running jobs end.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trainer.service.jobs import Devices


@dataclass(frozen=True, slots=True)
class Need:
    """What a job needs: numbers of GPUs and of CPUs."""

    gpus: int
    cpus: int


def choose(
    waiting: Sequence[tuple[int, Need]], running: Iterable[Devices], machine: Devices
) -> list[tuple[int, Devices]]:
    """Returns the jobs that start now, with the devices that each gets.

    Args:
        waiting: numbers and needs of the jobs that may start, in their order. None needs more than the machine has.
        running: the devices of the jobs that run.
    """
    taken = list(running)
    free = _without(machine, taken)
    refused: set[Need] = set()  # of each need once: thousands of jobs may wait
    started = []
    for number, need in waiting:
        if need in refused:  # and since then there is only less room
            continue
        if _fits(need, free) and not any(_may_delay(need, other, free, taken) for other in refused):
            devices = Devices(free.gpus[: need.gpus], free.cpus[: need.cpus])
            taken.append(devices)
            free = _without(machine, taken)
            started.append((number, devices))
        else:
            refused.add(need)
    return started


def _without(machine: Devices, taken: Sequence[Devices]) -> Devices:
    gpus = {gpu for devices in taken for gpu in devices.gpus}
    cpus = {cpu for devices in taken for cpu in devices.cpus}
    return Devices(
        tuple(gpu for gpu in machine.gpus if gpu not in gpus), tuple(cpu for cpu in machine.cpus if cpu not in cpus)
    )


def _fits(need: Need, free: Devices) -> bool:
    return need.gpus <= len(free.gpus) and need.cpus <= len(free.cpus)


def _may_delay(need: Need, blocked: Need, free: Devices, taken: Sequence[Devices]) -> bool:
    """Returns whether starting one job can make the blocked one wait longer.

    It cannot if, whenever enough running jobs have ended for the blocked one, there is room for both.
    """
    gpus = _reachable(len(free.gpus), [len(devices.gpus) for devices in taken])
    cpus = _reachable(len(free.cpus), [len(devices.cpus) for devices in taken])
    return any(
        mine and theirs and any(theirs <= number < theirs + mine for number in numbers)
        for mine, theirs, numbers in ((need.gpus, blocked.gpus, gpus), (need.cpus, blocked.cpus, cpus))
    )


def _reachable(free: int, running: Iterable[int]) -> set[int]:
    """Returns each number that can be free after some of the running jobs have ended."""
    numbers = {free}
    for size in running:
        numbers |= {number + size for number in numbers}
    return numbers
