"""Files that a command line names: a pipe that nobody writes to, or a device, makes no command wait."""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from convoy.images import ImageError, read_image
from convoy.named_files import check_regular, read_file, read_regular
from serving.client.cli import ConnectConfig
from serving.client.errors import ClientError
from serving.client.images import ImageFile
from trainer.compare import compare_runs
from trainer.config import TrainConfig
from trainer.data.mapped_file import map_tensors
from trainer.errors import TrainerError
from trainer.evaluation.ledger import Ledger
from trainer.files import locked
from trainer.records.checkpoint import Checkpoints
from trainer.records.metrics import read_metrics, read_new_metrics
from trainer.records.result import Result
from trainer.service.client import open_service
from trainer.service.store import JobStore
from trainer.studies.folder import StudyFolder
from trainer.watch.run import state_of


def test_a_file_and_a_pipe_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"one")
    assert read_file(tmp_path / "file") == b"one"
    (tmp_path / "file").write_bytes(b"")
    assert read_file(tmp_path / "file") == b""
    reading, writing = os.pipe()  # as in --config <(command)
    with os.fdopen(reading), os.fdopen(writing, "wb") as pipe:

        def write() -> None:
            with pipe:
                pipe.write(b"two")

        writer = threading.Timer(0.02, write)
        writer.start()
        assert read_file(f"/dev/fd/{reading}") == b"two"
        writer.join()


def test_what_is_no_file_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    reasons = {
        tmp_path / "pipe": "a pipe that nobody writes to",
        tmp_path / "socket": "No such device",
        tmp_path: "Is a directory",
        Path("/dev/zero"): "it is a device",
        tmp_path / "missing": "No such file",
    }
    for path, reason in reasons.items():
        with pytest.raises(OSError, match=reason) as raised:
            read_file(path)
        assert raised.value.filename == str(path)
        if path.exists():
            with pytest.raises(OSError, match=r"no regular file|Is a directory"):
                check_regular(path)
            with pytest.raises(OSError, match=r"no regular file|No such device|Is a directory"):
                read_regular(path)
    check_regular(tmp_path / "missing")


def read_config(path: Path) -> None:
    from trainer.config_file import CommandLine

    CommandLine.read(["--config", str(path)])


def open_jobs_of(**files: Path) -> None:
    with open_service("127.0.0.1:1", files.get("token"), files.get("ca"), print):
        pass


@pytest.mark.parametrize(
    "use",
    [
        read_config,
        lambda path: TrainConfig(recipe=f"{path}.toml").resolve(),
        lambda path: TrainConfig(recipe=f"{path}.py:recipe").resolve(),
        lambda path: TrainConfig(network=f"{path}.py:Net").resolve(),
        lambda path: TrainConfig(weights=f"{path}.pth").resolve(),
        lambda path: TrainConfig(weights=f"{path}.safetensors").resolve(),
        lambda path: JobStore(str(path)),
        lambda path: JobStore(f"sqlite:///{path}"),
        lambda path: open_jobs_of(token=path),
        lambda path: open_jobs_of(ca=path),
        lambda path: ConnectConfig(token_file=path).client(),
        lambda path: ConnectConfig(tls_ca=path).client(),
        ImageFile.read,
        lambda path: read_image(path, (1, 8, 8)),
    ],
)
def test_no_option_waits_for_a_pipe(use: Callable[[Path], object], tmp_path: Path) -> None:
    for suffix in ("", ".toml", ".py", ".pth", ".safetensors"):
        os.mkfifo(tmp_path / f"pipe{suffix}")
    with pytest.raises((TrainerError, ClientError, ImageError), match=r"a pipe that nobody writes to|no regular file"):
        use(tmp_path / "pipe")


def lock(path: Path) -> None:
    with locked(path, print, "waiting"):
        pass


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", lambda folder: compare_runs([folder])),
        ("result.json", lambda folder: Result.read(folder / "result.json")),
        ("ledger.jsonl", lambda folder: Ledger(folder / "ledger.jsonl").all_entries()),
        ("study.json", lambda folder: StudyFolder(folder, "seeds").description()),
        ("results.jsonl", lambda folder: StudyFolder(folder, "seeds").results()),
        ("metrics.jsonl", read_metrics),
        ("metrics.jsonl", lambda folder: read_new_metrics(folder, 0)),
        ("step-00000001/manifest.json", lambda folder: Checkpoints(folder, print).load_newest()),
        ("step-00000001/state.pt", lambda folder: Checkpoints(folder, print).load_newest()),
        ("mnist.pt", lambda folder: map_tensors(folder / "mnist.pt")),
        (".in-use", lambda folder: lock(folder / ".in-use")),
    ],
)
def test_no_file_of_a_folder_that_is_named_waits(name: str, read: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if path.name == "state.pt":
        path.with_name("manifest.json").write_text('{"step": 1, "sha256": ""}')
    os.mkfifo(path)
    with pytest.raises((TrainerError, OSError), match=r"it is no regular file|No such device"):  # the latter to write
        read(tmp_path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises((TrainerError, OSError), match="it is no regular file"):
        read(tmp_path)


def test_a_pipe_in_place_of_a_failure_is_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "failure.json")
    assert state_of(tmp_path)[0] == "stopped"
