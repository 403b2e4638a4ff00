"""Which jobs start: priorities and order are the store's; here, what fits, and what may overtake."""

import time
from itertools import permutations

import pytest

from trainer.service.jobs import Devices
from trainer.service.scheduling import Need, choose

MACHINE = Devices(tuple("01234567"), tuple(range(16)))


def started(waiting: list[Need], running: list[Devices]) -> list[int]:
    return [number for number, _ in choose(list(enumerate(waiting)), running, MACHINE)]


def gpus(*names: int) -> Devices:
    return Devices(tuple(map(str, names)))


def test_jobs_start_in_their_order_while_they_fit_and_share_no_device() -> None:
    found = choose([(7, Need(4, 0)), (8, Need(2, 4)), (9, Need(2, 12))], [], MACHINE)
    assert found == [
        (7, Devices(("0", "1", "2", "3"), ())),
        (8, Devices(("4", "5"), (0, 1, 2, 3))),
        (9, Devices(("6", "7"), tuple(range(4, 16)))),
    ]


@pytest.mark.parametrize(
    ("waiting", "running", "expected"),
    [
        ([Need(8, 0), Need(1, 0)], [gpus(0)], []),  # would make the first one wait for both
        ([Need(4, 0), Need(2, 0)], [gpus(0, 1), gpus(2, 3, 4, 5)], []),  # 2 + 2 are free when the first job ends
        ([Need(5, 0), Need(2, 0)], [gpus(0, 1, 2, 3, 4, 5)], [1]),  # when that job ends, 8 are free: room for both
        ([Need(8, 0), Need(0, 4)], [gpus(0)], [1]),  # wants nothing that the first one waits for
        ([Need(8, 16), Need(0, 4)], [gpus(0)], []),
        ([Need(8, 0), Need(8, 0), Need(0, 1), Need(1, 0)], [gpus(0)], [2]),
    ],
)
def test_a_job_overtakes_only_if_it_delays_nobody(
    waiting: list[Need], running: list[Devices], expected: list[int]
) -> None:
    assert started(waiting, running) == expected


def test_thousands_of_jobs_that_wait_cost_no_time() -> None:
    waiting = [*[Need(0, 16)] * 3000, Need(8, 0), *[Need(1, 0)] * 3000]
    began = time.process_time()
    assert started(waiting, [Devices(("0",), tuple(range(8)))]) == []
    assert time.process_time() - began < 1.0


def test_in_whatever_order_jobs_end_the_first_one_starts_as_early_as_without_the_others() -> None:
    running = [gpus(0), gpus(1, 2), gpus(3, 4, 5)]
    for first in range(3, 9):
        for small in (1, 2):
            overtakes = started([Need(first, 0), Need(small, 0)], running) == [1]
            for order in permutations(running):
                free = 2
                for ended in order:
                    free += len(ended.gpus)
                    if free >= first:
                        assert not overtakes or free - small >= first
                        break
