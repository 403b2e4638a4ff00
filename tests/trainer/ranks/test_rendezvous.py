"""Each round gets a new name, whatever earlier rounds have left in the store."""

import socket
import threading

import pytest
import torch.distributed as dist

from tests.conftest import free_port, wait_for
from trainer.errors import ConfigError, TrainerError
from trainer.ranks import rendezvous as module
from trainer.ranks import waiting
from trainer.ranks.environment import RankEnvironment
from trainer.ranks.rendezvous import connect, join_round, rendezvous


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


def environment(rank: int, size: int, port: int) -> RankEnvironment:
    return RankEnvironment(is_launched=True, rank=rank, world_size=size, master_addr="127.0.0.1", master_port=port)


def start(rank: int, size: int, port: int) -> threading.Thread:
    """Starts a thread for a rank that meets the others."""

    def join() -> None:
        here = environment(rank, size, port)
        join_round(connect(here), here)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    return thread


def wait_for_line(begin: str, capfd: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []

    def is_told() -> bool:
        lines.extend(capfd.readouterr().err.splitlines())
        return any(line.startswith(begin) for line in lines)

    wait_for(begin, is_told)


def test_rank_0_names_the_missing_ranks_and_the_address(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "FIRST_S", 0.2)
    port = free_port()
    ranks = [start(0, 4, port), start(2, 4, port)]
    remedy = ": start it, or unset RANK and WORLD_SIZE to train with one process"
    wait_for_line(f"rank 0 waits for ranks 1, 3 of 4 at 127.0.0.1:{port}{remedy}", capfd)
    ranks += [start(1, 4, port), start(3, 4, port)]
    for thread in ranks:
        thread.join(60)
        assert not thread.is_alive()


def test_every_rank_logs_that_rank_0_is_missing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "FIRST_S", 0.2)
    port = free_port()
    ranks = [start(1, 3, port), start(2, 3, port)]
    wait_for_line(f"rank 1 waits for rank 0 at 127.0.0.1:{port}", capfd)
    ranks.append(start(0, 3, port))
    for thread in ranks:
        thread.join(60)
        assert not thread.is_alive()


def test_ranks_that_do_not_start_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "JOIN_TIMEOUT_S", 0.1)
    here = environment(0, 3, free_port())
    with pytest.raises(TrainerError, match=r"rank 0 waited for ranks 1, 2 of 3 at 127\.0\.0\.1:"):
        join_round(connect(here), here)


def test_a_port_that_another_program_uses_is_a_mistake() -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"rank 0 cannot open 127.0.0.1:{port}, .*address already in use"):
            connect(environment(0, 2, port))


def test_an_address_without_a_store_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TrainerError, match=r"rank 1 found no store at 127\.0\.0\.1:"):
        connect(environment(1, 2, free_port()), timeout_s=0.2)
