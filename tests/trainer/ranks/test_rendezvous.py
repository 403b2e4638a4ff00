"""Rounds get names of their own, whatever earlier ones have left in the store."""

import threading

import torch.distributed as dist

from trainer.ranks.rendezvous import rendezvous


def round_of(server: dist.TCPStore, size: int) -> list[str]:
    """The names that so many ranks get, each in a thread with a connection of its own."""
    names = [""] * size

    def join(rank: int) -> None:
        names[rank] = rendezvous(server.clone(), rank, size)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in reversed(range(size))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return names


def test_every_round_has_one_name_of_its_own() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    names = [round_of(server, size) for size in (3, 2, 3, 4)]
    assert all(len(set(of_round)) == 1 and of_round[0] for of_round in names)
    assert len({of_round[0] for of_round in names}) == 4


def test_a_rank_that_died_while_it_waited_is_not_counted() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    server.set("convoy/hello/1", "a rank that has gone since")
    names = round_of(server, 2)
    assert names[0] == names[1] != ""
