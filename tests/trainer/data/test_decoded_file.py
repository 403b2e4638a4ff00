"""The decoded file: atomic, verified, shared between processes, and created once."""

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.data.tiny_dataset import make_content
from trainer.data import decoded_file
from trainer.data.content import DatasetContent, content_digest
from trainer.data.decoded_file import (
    DamagedFileError,
    open_decoded,
    open_or_create,
    write_decoded,
)
from trainer.data.mapped_file import discard, share_lock
from trainer.errors import ConfigError, DataError

CONTENT = make_content()


@pytest.fixture
def decoded_path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny" / "tiny.pt"
    path.parent.mkdir()
    write_decoded(CONTENT, path)
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_written_and_read_again(decoded_path: Path) -> None:
    decoded = open_decoded(decoded_path)
    assert decoded.sha256 == content_digest(CONTENT) == content_digest(decoded.content)
    assert decoded.content.classes == CONTENT.classes
    assert torch.equal(decoded.content.train.images, CONTENT.train.images)
    assert torch.equal(decoded.content.test.labels, CONTENT.test.labels)
    assert decoded.content.validation is None
    assert names_in(decoded_path.parent) == ["tiny.pt"]


def test_a_file_that_is_being_verified_is_in_use(decoded_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(content: DatasetContent) -> str:
        discard(decoded_path)  # as another process does whose folder of images has changed
        return content_digest(content)

    monkeypatch.setattr(decoded_file, "content_digest", digest)
    decoded = open_decoded(decoded_path)
    assert decoded_path.exists()
    del decoded
    discard(decoded_path)
    assert not decoded_path.exists()


def test_a_file_that_is_discarded_while_it_is_opened_is_none(
    decoded_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lock_late(path: Path, tensor: torch.Tensor) -> None:
        discard(path)
        share_lock(path, tensor)

    monkeypatch.setattr(decoded_file, "share_lock", lock_late)
    with pytest.raises(FileNotFoundError):
        open_decoded(decoded_path)


def test_a_view_is_written_without_its_base(tmp_path: Path) -> None:
    large = make_content(num_train=10_000)
    part = type(CONTENT.train)(large.train.images[:10], large.train.labels[:10])
    write_decoded(type(CONTENT)("tiny", CONTENT.classes, part, CONTENT.test), tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 20_000


def test_the_digest_covers_shape_dtype_and_split(tmp_path: Path) -> None:
    digest = content_digest(CONTENT)
    train, test = CONTENT.train, CONTENT.test
    kind, whole = type(train), type(CONTENT)
    reshaped = kind(train.images.reshape(-1, 1, 4, 16), train.labels)
    narrower = kind(train.images, train.labels.to(torch.int32))
    others = [
        whole("tiny", CONTENT.classes, reshaped, test),
        whole("tiny", CONTENT.classes, narrower, test),
        whole("tiny", CONTENT.classes, test, train),
        whole("tiny", CONTENT.classes, train, test, validation=test),
    ]
    assert len({digest, *map(content_digest, others)}) == 5


@pytest.mark.parametrize("keep", [0, 1, 100, 3000, -1])
def test_truncated(decoded_path: Path, keep: int) -> None:
    decoded_path.write_bytes(decoded_path.read_bytes()[:keep])
    for verify in (True, False):
        with pytest.raises(DamagedFileError, match=f"{decoded_path} is damaged"):
            open_decoded(decoded_path, verify=verify)


def test_one_flipped_bit(decoded_path: Path) -> None:
    data = bytearray(decoded_path.read_bytes())
    data[data.index(CONTENT.test.images.numpy().tobytes()) + 7] ^= 1
    decoded_path.write_bytes(data)
    open_decoded(decoded_path, verify=False)
    with pytest.raises(DamagedFileError, match="does not match its digest"):
        open_decoded(decoded_path)


def test_other_files(decoded_path: Path) -> None:
    for foreign in ([1, 2], {"layout": 7}, {"layout": 1, "name": "x"}):
        torch.save(foreign, decoded_path)
        with pytest.raises(DamagedFileError):
            open_decoded(decoded_path)
    decoded_path.write_text("<html>")
    with pytest.raises(DamagedFileError):
        open_decoded(decoded_path)


@pytest.mark.parametrize(
    "change",
    [
        {"train_images": [1, 2]},
        {"train_images": torch.zeros(40, 8, 8, dtype=torch.uint8)},
        {"train_labels": torch.zeros(39, dtype=torch.int64)},
        {"test_labels": torch.full((20,), 2)},
        {"test_images": torch.zeros(20, 1, 8, 8)},
        {"pixel_statistics": 7},
    ],
    ids=lambda change: str(*change),
)
def test_a_file_placed_by_hand_must_hold_images_and_labels(decoded_path: Path, change: dict[str, Any]) -> None:
    torch.save(torch.load(decoded_path, weights_only=True) | change, decoded_path)
    for verify in (True, False):
        with pytest.raises(DamagedFileError, match="is damaged"):
            open_decoded(decoded_path, verify=verify)


@pytest.mark.parametrize("name", [b"caf\xe9", b"\xff\xfe", "tr\u00e4ge".encode("latin-1")])
def test_paths_need_not_be_utf8(tmp_path: Path, name: bytes, logged: list[str]) -> None:
    path = tmp_path / os.fsdecode(name) / f"{os.fsdecode(name)}.pt"
    for _ in range(2):
        assert open_tiny(path, logged) == content_digest(CONTENT)
    assert logged == []


def test_only_content_is_damaged_never_a_path(tmp_path: Path, decoded_path: Path, logged: list[str]) -> None:
    folder = tmp_path / "folder.pt"
    folder.mkdir()
    for path in (folder, tmp_path / ("x" * 256)):
        with pytest.raises(DataError, match=r"cannot be opened: (Is a directory|File name too long)") as caught:
            open_decoded(path)
        assert not isinstance(caught.value, DamagedFileError)
    with pytest.raises(DataError, match="cannot be opened: Is a directory"):
        open_tiny(folder, logged)
    assert logged == []


def test_a_file_that_cannot_be_mapped_is_not_damaged(decoded_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"unable to mmap 99 bytes from file <{decoded_path}>: Cannot allocate memory (12)\nmore")

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(DataError, match=r"cannot be mapped into memory: .* memory \(12\)$") as caught:
        open_decoded(decoded_path)
    assert not isinstance(caught.value, DamagedFileError)


def test_the_significant_bits_are_kept_and_older_files_have_none(decoded_path: Path) -> None:
    assert open_decoded(decoded_path).content.significant_bits is None
    write_decoded(replace(CONTENT, significant_bits=12), decoded_path)
    assert open_decoded(decoded_path).content.significant_bits == 12
    payload = torch.load(decoded_path, weights_only=True)
    del payload["significant_bits"]
    torch.save(payload, decoded_path)
    assert open_decoded(decoded_path).content.significant_bits is None


def test_another_digest_than_the_published_one(decoded_path: Path) -> None:
    with pytest.raises(DamagedFileError, match="not the published one"):
        open_decoded(decoded_path, expected_sha256="0" * 64, verify=False)


def open_tiny(path: Path, logged: list[str]) -> str:
    decoded = open_or_create(
        path,
        lambda: CONTENT,
        lock_path=path.parent.parent / "tiny.lock",
        expected_sha256=content_digest(CONTENT),
        verify=True,
        log=logged.append,
    )
    return decoded.sha256


def test_a_damaged_file_is_set_aside_and_made_again(decoded_path: Path, logged: list[str]) -> None:
    good = decoded_path.read_bytes()
    decoded_path.write_bytes(good[:-100])
    assert open_tiny(decoded_path, logged) == content_digest(CONTENT)
    assert names_in(decoded_path.parent) == ["tiny.damaged", "tiny.pt"]
    assert decoded_path.read_bytes() == good
    assert logged == [f"{decoded_path} is damaged (not a file of tensors); set aside as tiny.damaged, making it again"]


def test_a_good_file_needs_no_writing(decoded_path: Path, logged: list[str]) -> None:
    open_tiny(decoded_path, logged)
    assert logged == []
    assert names_in(decoded_path.parent.parent) == ["tiny"]  # no lock was taken


def test_unfinished_files_of_killed_processes_are_removed(tmp_path: Path, logged: list[str]) -> None:
    leftover = tmp_path / "tiny" / ".tmp-4242-abcd"
    leftover.mkdir(parents=True)
    (leftover / "tiny.pt").write_bytes(b"half")
    open_tiny(tmp_path / "tiny" / "tiny.pt", logged)
    assert names_in(tmp_path / "tiny") == ["tiny.pt"]


def test_without_locks_unfinished_files_stay(
    tmp_path: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / "tiny" / ".tmp-4242-abcd").mkdir(parents=True)
    open_tiny(tmp_path / "tiny" / "tiny.pt", logged)
    assert names_in(tmp_path / "tiny") == [".tmp-4242-abcd", "tiny.pt"]


def test_content_with_another_digest_is_refused(tmp_path: Path, logged: list[str]) -> None:
    path = tmp_path / "tiny" / "tiny.pt"
    with pytest.raises(DataError, match="decoded content has digest"):
        open_or_create(
            path,
            lambda: make_content(seed=1),
            lock_path=tmp_path / "tiny.lock",
            expected_sha256=content_digest(CONTENT),
            verify=True,
            log=logged.append,
        )
    assert names_in(tmp_path) == ["tiny.lock"]  # the folder is gone, too


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_decoded(CONTENT, tmp_path / "tiny.pt")
    assert names_in(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB; if mounting is not allowed, a limit on this process's file size instead."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        yield disk
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_line(small_disk: Path) -> None:
    with pytest.raises(DataError, match=rf"disk full: about 2\.\d MB are needed in {small_disk}, .* MB are free"):
        write_decoded(make_content(side=20, num_train=6000), small_disk / "tiny.pt")
    assert names_in(small_disk) == []


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, logged: list[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another --data-dir"):
        open_tiny(tmp_path / "file" / "tiny" / "tiny.pt", logged)
    with pytest.raises(ConfigError, match="cannot write in /proc/x"):
        open_tiny(Path("/proc/x/tiny.pt"), logged)


SHARING = """
import json, os, sys
from pathlib import Path
from trainer.data.decoded_file import open_decoded

def private_kb(path):
    private, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            here = line.endswith(str(path))
        elif here and line.startswith(("Private_Dirty:", "Private_Clean:")):
            private += int(line.split()[1])
    return private

path = Path(sys.argv[1])
ready, done = os.pipe(), os.pipe()
children = []
for _ in range(2):
    answer = os.pipe()
    if os.fork() == 0:
        content = open_decoded(path).content  # touches every page
        os.write(ready[1], b"x")
        os.read(done[0], 1)
        os.write(answer[1], json.dumps(private_kb(path)).encode())
        os._exit(0)
    children.append(answer[0])
for _ in children:
    os.read(ready[0], 1)
os.write(done[1], b"xx")  # both have it mapped now
print(json.dumps([json.loads(os.read(answer, 100)) for answer in children]))
for _ in children:
    os.wait()
"""


def test_processes_share_their_memory(tmp_path: Path) -> None:
    path = tmp_path / "tiny.pt"
    write_decoded(make_content(side=28, num_train=20_000), path)
    command = [sys.executable, "-c", SHARING, str(path)]
    # The second process to answer may be the only one with the mapping by then: the smaller figure counts.
    private_kb = min(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert path.stat().st_size > 15_000_000
    assert private_kb < 500
