"""Each round gets a new name, whatever earlier rounds have left in the store."""

import threading

import torch.distributed as dist

from trainer.ranks.rendezvous import rendezvous


def names_of_round(server: dist.TCPStore, size: int) -> list[str]:
    """Returns the names that so many ranks get, each in a thread with a connection of its own."""
    names = [""] * size

    def join(rank: int) -> None:
        names[rank] = rendezvous(server.clone(), rank, size)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in reversed(range(size))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return names


def test_all_ranks_of_a_round_get_the_same_new_name() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    names = [names_of_round(server, size) for size in (3, 2, 3, 4)]
    assert all(len(set(names_of_one)) == 1 and names_of_one[0] for names_of_one in names)
    assert len({names_of_one[0] for names_of_one in names}) == 4


def test_a_rank_that_died_while_it_waited_does_not_count() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    server.set("convoy/hello/1", "the id of a dead rank")
    names = names_of_round(server, 2)
    assert names[0] == names[1] != ""
