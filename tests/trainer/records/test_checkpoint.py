"""Checkpoints: complete or absent, verified before use."""

import errno
import multiprocessing
import os
import resource
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import fill
from trainer.errors import CheckpointError
from trainer.files import sha256_of_file
from trainer.records.checkpoint import NUM_KEPT, Checkpoints, copy_to_cpu, weights_sha256


def state(step: int) -> dict[str, Any]:
    return {"step": step, "model": {"weight": torch.full((4,), float(step))}, "optimizer": {"momenta": [[]]}}


@pytest.fixture
def printed() -> list[str]:
    return []


@pytest.fixture
def checkpoints(tmp_path: Path, printed: list[str]) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", printed.append)


def test_the_newest_is_loaded_and_the_last_three_are_kept(checkpoints: Checkpoints, tmp_path: Path) -> None:
    assert checkpoints.load_newest() is None
    assert checkpoints.newest() is None
    for step in range(1, 6):
        checkpoints.save(step, state(step))
    loaded = checkpoints.load_newest()
    assert loaded is not None
    assert loaded["step"] == 5
    assert torch.equal(loaded["model"]["weight"], torch.full((4,), 5.0))
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000004", "step-00000005"]
    assert len(kept) == NUM_KEPT


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no manifest", "no state", "manifest is not JSON"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    damage: str, checkpoints: Checkpoints, tmp_path: Path, printed: list[str]
) -> None:
    checkpoints.save(1, state(1))
    checkpoints.save(2, state(2))
    newest = tmp_path / "checkpoints" / "step-00000002"
    content = (newest / "state.pt").read_bytes()
    match damage:
        case "truncated":
            (newest / "state.pt").write_bytes(content[:-10])
        case "flipped":
            (newest / "state.pt").write_bytes(content[:400] + bytes([content[400] ^ 1]) + content[401:])
        case "no manifest":
            (newest / "manifest.json").unlink()
        case "no state":
            (newest / "state.pt").unlink()
        case "manifest is not JSON":
            (newest / "manifest.json").write_text("{")
    loaded = checkpoints.load_newest()
    assert loaded is not None
    assert loaded["step"] == 1
    assert len(printed) == 1
    assert "step-00000002 is damaged and skipped" in printed[0]


def test_checkpoints_that_a_training_adds_and_removes_while_they_are_read(
    checkpoints: Checkpoints, tmp_path: Path, printed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sha256_after_others(path: Path) -> str:
        monkeypatch.undo()
        for step in range(2, 2 + NUM_KEPT):
            Checkpoints(tmp_path / "checkpoints", printed.append).save(step, state(step))
        return sha256_of_file(path)

    checkpoints.save(1, state(1))
    monkeypatch.setattr("trainer.records.checkpoint.sha256_of_file", sha256_after_others)
    loaded = checkpoints.load_newest()
    assert loaded is not None
    assert loaded["step"] == 1 + NUM_KEPT
    assert printed == []


def test_an_unreadable_checkpoint_is_not_called_damaged_nor_replaced(
    checkpoints: Checkpoints, printed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    checkpoints.save(1, state(1))
    checkpoints.save(2, state(2))
    monkeypatch.setattr("trainer.records.checkpoint.sha256_of_file", deny)
    with pytest.raises(CheckpointError, match=r"cannot read checkpoint .*step-00000002: Permission denied"):
        checkpoints.load_newest()
    assert printed == []


def test_an_unreadable_folder_is_not_an_empty_one(tmp_path: Path, printed: list[str]) -> None:
    """If it counted as empty, the training would start from the beginning."""
    (tmp_path / "checkpoints").touch()
    with pytest.raises(CheckpointError, match=r"cannot read .*checkpoints: Not a directory"):
        Checkpoints(tmp_path / "checkpoints", printed.append).load_newest()


def test_half_written_checkpoints_are_ignored_and_removed(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.save(1, state(1))
    half = tmp_path / "checkpoints" / ".step-00000002.node-0.4242.tmp"
    half.mkdir()
    (half / "state.pt").write_bytes(b"half")
    loaded = checkpoints.load_newest()
    assert loaded is not None
    assert loaded["step"] == 1
    checkpoints.save(2, state(2))
    assert not half.exists()


def test_the_first_save_after_damaged_checkpoints_replaces_them(checkpoints: Checkpoints, tmp_path: Path) -> None:
    for step in range(10, 60, 10):
        checkpoints.save(step, state(step))
    for step in (40, 50):
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "state.pt").write_bytes(b"damaged")
    loaded = checkpoints.load_newest()
    assert loaded is not None
    assert loaded["step"] == 30
    checkpoints.save(31, state(31))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000030", "step-00000031"]
    loaded = checkpoints.load_newest()
    assert loaded is not None
    assert loaded["step"] == 31


class _Blocking:
    """Blocks while it is pickled: sends a message to a pipe and waits for one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __reduce__(self) -> tuple[type[int], tuple[()]]:
        self._connection.send("writing")
        self._connection.recv()
        return int, ()


def _save_slowly(folder: Path, connection: Connection) -> None:
    try:
        Checkpoints(folder, lambda line: None).save(2, {**state(7), "slow": _Blocking(connection)})
        connection.send("saved")
    except CheckpointError as error:
        connection.send(str(error))


def test_a_superseded_process_that_still_writes_damages_nothing(checkpoints: Checkpoints, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    process = context.Process(target=_save_slowly, args=(tmp_path / "checkpoints", theirs))
    process.start()
    assert connection.poll(60)
    assert connection.recv() == "writing"
    checkpoints.save(2, state(2))
    connection.send("continue")
    assert connection.recv().startswith("cannot save a checkpoint")
    process.join()
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000002"]
    loaded = checkpoints.load_newest()
    assert loaded is not None
    assert loaded["model"]["weight"].tolist() == [2.0] * 4


def _save_with_little_room(folder: Path, results: "multiprocessing.Queue[str]") -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails, as on a full disk, and the process lives
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        Checkpoints(folder, lambda line: None).save(2, {**state(2), "big": torch.zeros(10_000)})
        results.put("saved")
    except CheckpointError as error:
        results.put(str(error))


def test_a_failed_save_is_one_error_and_leaves_nothing_behind(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.save(1, state(1))
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_save_with_little_room, args=(tmp_path / "checkpoints", results))
    process.start()
    message = results.get(timeout=60)
    process.join()
    assert message.startswith("cannot save a checkpoint in")
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]


def test_a_full_disk_is_one_error_and_the_next_save_tries_again(small_disk: Path) -> None:
    checkpoints = Checkpoints(small_disk / "checkpoints", lambda line: None)
    checkpoints.save(1, state(1))
    filler = fill(small_disk)
    with pytest.raises(CheckpointError, match=r"cannot save a checkpoint in .*: No space left on device"):
        checkpoints.save(2, {**state(2), "big": torch.zeros(100_000)})
    assert os.listdir(small_disk / "checkpoints") == ["step-00000001"]
    filler.unlink()
    checkpoints.save(3, {**state(3), "big": torch.zeros(100_000)})
    loaded = checkpoints.load_newest()
    assert loaded is not None
    assert loaded["step"] == 3


def test_later_steps_do_not_change_the_copy_of_a_state() -> None:
    weight = torch.ones(3)
    copied = copy_to_cpu({"step": 1, "model": {"weight": weight}, "optimizer": {"momenta": [[weight]]}})
    weight.add_(1)
    assert copied["model"]["weight"].tolist() == copied["optimizer"]["momenta"][0][0].tolist() == [1, 1, 1]


def test_the_weights_digest_is_over_sorted_names_and_bytes() -> None:
    import hashlib

    model = nn.BatchNorm1d(3)
    digest = hashlib.sha256()
    for name in sorted(model.state_dict()):
        digest.update(name.encode("utf-8") + model.state_dict()[name].contiguous().numpy().tobytes())
    assert weights_sha256(model) == digest.hexdigest()


def test_the_weights_digest_does_not_depend_on_the_memory_format() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3)
    before = weights_sha256(model)
    assert weights_sha256(model.to(memory_format=torch.channels_last)) == before
    with torch.no_grad():
        model.bias[0] += 1  # type: ignore[index]
    assert weights_sha256(model) != before
