"""One rank reports a failure, and also writes it to the disk."""

import json
from pathlib import Path

import torch.distributed as dist

from trainer.ranks.failure import FailureContext, FailureLock, write_error, write_failure


def test_the_first_rank_gets_the_lock_and_each_round_has_its_own() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first, second = FailureLock(store, "round", 1), FailureLock(store, "round", 0)
    assert second.holder() is None
    assert first.acquire() == 1
    assert second.acquire() == 1
    assert second.holder() == 1
    assert FailureLock(store, "next round", 0).holder() is None


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
