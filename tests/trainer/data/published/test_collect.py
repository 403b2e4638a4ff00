"""Known files are found in folders and archives, and no other file is taken for them."""

import gzip
import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.trainer.data.tiny_dataset import NAMES, idx_files, make_content, make_dataset_info
from trainer.data.published.collect import collect_files
from trainer.data.published.errors import MissingFilesError, SourceError

FILES = idx_files(make_content())
OTHER_FILES = idx_files(make_content(seed=1))
KNOWN = make_dataset_info().formats[0].files


def collect(folder: Path, *roots: Path) -> dict[str, bytes]:
    into = folder / "into"
    into.mkdir(parents=True)
    return {name: path.read_bytes() for name, path in collect_files(roots, KNOWN, into).items()}


def put(folder: Path, files: dict[str, bytes], ending: str = "") -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / f"{name}{ending}").write_bytes(gzip.compress(data) if ending == ".gz" else data)
    return folder


def make_tar(path: Path, files: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(f"some/where/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_in_a_folder(tmp_path: Path, ending: str) -> None:
    assert collect(tmp_path, put(tmp_path / "a", FILES, ending)) == FILES


def test_anywhere_below(tmp_path: Path) -> None:
    put(tmp_path / "a/b/c", FILES, ".gz")
    assert collect(tmp_path, tmp_path / "a") == FILES


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("x.tgz", "w:gz"),
        ("x.tar", "w"),
        ("x.tar.gz", "w:gz"),
        ("x.tar.xz", "w:xz"),
        ("x.txz", "w:xz"),
        ("x.tar.bz2", "w:bz2"),
        ("x.tbz2", "w:bz2"),
    ],
)
def test_in_a_tar(tmp_path: Path, name: str, mode: str) -> None:
    path = make_tar(tmp_path / name, FILES, mode)
    assert collect(tmp_path, path) == FILES


def test_in_a_zip_with_gzipped_members(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in FILES.items():
            archive.writestr(f"deep/{name}.gz", gzip.compress(data))
    assert collect(tmp_path, path) == FILES


def test_files_of_the_same_name_are_distinguished_by_digest(tmp_path: Path) -> None:
    put(tmp_path / "root/AnotherSet/raw", OTHER_FILES)
    put(tmp_path / "root/TheSet/raw", FILES)
    assert collect(tmp_path, tmp_path / "root") == FILES


def test_wrong_digest_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="train-images-idx3-ubyte has the wrong digest"):
        collect(tmp_path, put(tmp_path / "a", OTHER_FILES))


@pytest.mark.parametrize(("cut", "reason"), [(-1, "instead of"), (30, "instead of")])
def test_truncated_file_is_named(tmp_path: Path, cut: int, reason: str) -> None:
    files = FILES | {NAMES[0]: FILES[NAMES[0]][:cut]}
    with pytest.raises(SourceError, match=reason):
        collect(tmp_path, put(tmp_path / "a", files))


def test_truncated_and_corrupt_gzip_is_named(tmp_path: Path) -> None:
    folder = put(tmp_path / "a", FILES, ".gz")
    path = folder / f"{NAMES[0]}.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SourceError, match="cannot be read"):
        collect(tmp_path, folder)
    path.write_bytes(path.read_bytes()[:40] + b"rubbish" * 20)
    with pytest.raises(SourceError, match="cannot be read"):
        collect_files([folder], KNOWN, tmp_path / "into")


@pytest.mark.parametrize("keep", [50, 1500])
@pytest.mark.parametrize("kind", ["gz", "xz", "bz2"])
def test_truncated_or_corrupt_tar_is_named(tmp_path: Path, kind: str, keep: int) -> None:
    path = make_tar(tmp_path / f"x.tar.{kind}", FILES, f"w:{kind}")
    whole = path.read_bytes()
    for number, damaged in enumerate((whole[:keep], whole[:keep] + b"rubbish" * 2000)):
        path.write_bytes(damaged)
        with pytest.raises(SourceError, match=r"x\.tar\..* (cannot be read|has the wrong digest)"):
            collect(tmp_path / str(number), path)


@pytest.mark.parametrize(("place", "value"), [(6, 1), (8, 99), (8, 14)])  # encrypted, an unknown compression, no LZMA
def test_a_zip_that_cannot_be_unpacked_is_named(tmp_path: Path, place: int, value: int) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
    data = bytearray(path.read_bytes())
    start = data.index(b"PK\1\2")
    data[start + place + 2 : start + place + 4] = value.to_bytes(2, "little")
    data[place : place + 2] = value.to_bytes(2, "little")
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"x\.zip.* cannot be read"):
        collect(tmp_path, path)


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    folder = put(tmp_path / "a", {name: FILES[name] for name in NAMES[:3]})
    os.mkfifo(folder / NAMES[3])
    with pytest.raises(MissingFilesError, match=f"{NAMES[3]} not there"):
        collect(tmp_path, folder)


def test_a_broken_link_is_named(tmp_path: Path) -> None:
    folder = put(tmp_path / "a", {name: FILES[name] for name in NAMES[:3]})
    (folder / NAMES[3]).symlink_to(tmp_path / "gone")
    with pytest.raises(SourceError, match=f"{NAMES[3]} cannot be read"):
        collect(tmp_path, folder)


def test_a_decompression_bomb_stops_at_the_known_size(tmp_path: Path) -> None:
    folder = put(tmp_path / "a", FILES | {NAMES[1]: bytes(10_000_000)}, ".gz")
    with pytest.raises(SourceError, match=r"is longer than \d+ bytes"):
        collect(tmp_path, folder)
    assert (tmp_path / "into" / NAMES[1]).stat().st_size <= len(FILES[NAMES[1]])


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFilesError, match="none of the files is there"):
        collect(tmp_path, tmp_path)
    put(tmp_path / "a", {name: FILES[name] for name in NAMES[:3]})
    with pytest.raises(MissingFilesError, match=f"{NAMES[3]} not there"):
        collect_files([tmp_path / "a"], KNOWN, tmp_path / "into")
