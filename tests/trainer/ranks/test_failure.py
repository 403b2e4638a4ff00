"""One rank reports a failure, and also writes it to the disk."""

import json
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch.distributed as dist

from trainer.errors import TrainerError
from trainer.ranks import failure
from trainer.ranks.activity import Activity
from trainer.ranks.failure import FailureContext, FailureLock, report_failure, write_error, write_failure
from trainer.ranks.watchdog import Watchdog
from trainer.signals import StopRequest


def test_the_first_rank_gets_the_lock_and_each_round_has_its_own() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first, second = FailureLock(store, "round", 1), FailureLock(store, "round", 0)
    assert second.holder() is None
    assert first.acquire() == 1
    assert second.acquire() == 1
    assert second.holder() == 1
    assert FailureLock(store, "next round", 0).holder() is None


def test_the_rank_that_failed_first_is_known_when_the_store_is_gone() -> None:
    """The store ends with the launcher of that rank: ranks of other hosts must not replace its report by their own."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    informed, uninformed = (
        FailureLock(dist.TCPStore("127.0.0.1", server.port, wait_for_workers=False), "round", rank) for rank in (1, 2)
    )
    assert FailureLock(server, "round", 0).acquire() == 0
    assert informed.holder() == 0
    del server
    assert informed.acquire() == 0
    assert uninformed.acquire() == 2


def test_a_failure_is_written_with_its_stack(tmp_path: Path) -> None:
    context = FailureContext(rank=2, world_size=4, folder=tmp_path, step=17)
    try:
        raise ZeroDivisionError("a defect")
    except ZeroDivisionError as error:
        write_error(context, error, [2])
    record = json.loads((tmp_path / "failure.json").read_text())
    assert (record["ranks"], record["error"], record["message"]) == ([2], "ZeroDivisionError", "a defect")
    assert (record["step"], record["world_size"], record["told_by"]["rank"]) == (17, 4, 2)
    assert "test_a_failure_is_written_with_its_stack" in record["traceback"]


def test_without_a_folder_nothing_is_written_and_nothing_fails(tmp_path: Path) -> None:
    write_failure(FailureContext(), "gone", kind="Hang", trace=None, ranks=[])
    write_failure(FailureContext(folder=tmp_path / "missing"), "gone", kind="Hang", trace=None, ranks=[])
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_reports_and_is_slow_to_leave_is_not_ended_with_the_others() -> None:
    """torchrun sends SIGTERM to all ranks as soon as one has exited: the message was lost."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    reporting = report_failure(
        FailureContext(world_size=2), FailureLock(store, "round", 0), Watchdog(FailureContext(), Activity())
    )
    leaving = ExitStack()
    leaving.callback(signal.raise_signal, signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopRequest(), leaving, reporting:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("message", "is_lost_rank"),
    [
        ("[/x/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:6535: Connection reset by peer", True),
        ("NCCL communicator was aborted", True),
        ("Connection refused by the database", False),
    ],
)
def test_a_lost_connection_outside_of_collectives(
    message: str, is_lost_rank: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of another rank may show later, where the code waits for something else."""
    monkeypatch.setattr(failure, "LOCK_WAIT_S", 0.0)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    lock, watchdog = FailureLock(store, "round", 0), Watchdog(FailureContext(), Activity())
    expected = (TrainerError, "rank 0 lost another rank") if is_lost_rank else (RuntimeError, message)
    reporting = report_failure(FailureContext(world_size=2), lock, watchdog)
    with pytest.raises(expected[0], match=expected[1]), StopRequest(), reporting:
        raise RuntimeError(message)
