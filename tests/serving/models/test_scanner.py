"""Models and versions are recognised by name; changes of files are detected."""

import errno
import os

import pytest

from serving.errors import InvalidArgument, StartupError
from serving.models.scanner import check_name, check_repository, has_model, scan_model, scan_repository, scan_version
from tests.serving.model_files import scale, write_config, write_version


def test_models_are_visible_folders_with_a_configuration_or_a_version(tmp_path):
    write_version(tmp_path / "with-version", 1, b"x")
    write_config(tmp_path / "with-config", "")
    write_version(tmp_path / ".hidden", 1, b"x")
    write_version(tmp_path / "elsewhere/linked", 1, b"x")
    os.symlink(tmp_path / "elsewhere/linked", tmp_path / "link")
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "notes.txt").touch()
    assert list(scan_repository(tmp_path).models) == ["link", "with-config", "with-version"]
    assert has_model(tmp_path, "link")
    assert not has_model(tmp_path, "lost+found")
    assert not has_model(tmp_path, "notes.txt")


def test_versions_are_folders_named_by_a_positive_integer(tmp_path):
    for name in ("1", "12", "0", "-1", "1.5", "01", "latest", ".staging-7-abc", "²", "٣", "1" * 30):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").touch()
    (tmp_path / "7").touch()
    (tmp_path / "8").mkdir()
    files = scan_model(tmp_path)
    assert files is not None
    assert set(files.versions) == {1, 12}, "8 is empty: a copy may have just begun"


def test_file_stats_change_with_every_change_of_a_file(tmp_path):
    folder = write_version(tmp_path, 1, b"one")
    seen = {scan_version(folder)}
    (folder / "sub").mkdir()
    (folder / "sub/labels.txt").write_text("a")
    seen.add(scan_version(folder))
    (folder / "sub/labels.txt").write_text("ab")
    seen.add(scan_version(folder))
    os.utime(folder / "model.onnx", ns=(1, 1))
    seen.add(scan_version(folder))
    (folder / "copy").write_bytes(b"one")
    os.utime(folder / "copy", ns=(1, 1))
    os.rename(folder / "copy", folder / "model.onnx")
    seen.add(scan_version(folder))
    assert len(seen) == 5
    assert scan_version(folder) in seen


def test_own_files_are_those_beside_the_versions(tmp_path):
    write_config(tmp_path, "")
    write_version(tmp_path, 1, b"one")
    before = scan_model(tmp_path)
    write_version(tmp_path, 2, b"two")
    with_two = scan_model(tmp_path)
    write_config(tmp_path, "max_batch_size: 2")
    after = scan_model(tmp_path)
    assert before.own == with_two.own != after.own
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "x").write_bytes(b"1")
    assert [name for name, *_ in scan_model(tmp_path).own] == ["config.pbtxt", "warmup/x"]
    assert with_two.versions == after.versions


def test_missing_folders_have_no_models_and_no_files(tmp_path):
    assert scan_model(tmp_path / "gone") is None
    assert scan_version(tmp_path / "gone") == ()
    assert not has_model(tmp_path, "gone")


@pytest.mark.parametrize("name", ["", ".", "..", ".staging", "a/b", "/etc", "..\\x", "a\0b", "x" * 256])
def test_names_that_could_be_paths_are_rejected(name):
    with pytest.raises(InvalidArgument, match="is not a valid model name"):
        check_name(name)


@pytest.mark.parametrize("name", ["mnist", "mnist-fast_2.0", "züge", "x" * 255])
def test_names_of_folders_are_accepted(name):
    check_name(name)


def test_an_unusable_repository_is_reported_in_one_line(tmp_path):
    with pytest.raises(StartupError, match="there is no model repository"):
        check_repository(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match="is not a folder"):
        check_repository(tmp_path / "file")
    write_version(tmp_path / "models/m", 1, scale(2))
    with pytest.raises(StartupError, match="m is a model, not a repository of models: use its parent folder"):
        check_repository(tmp_path / "models/m")
    check_repository(tmp_path / "models")


# ---- what cannot be looked at is unknown -----------------------------------------------------------------------------


def test_unreadable_folders_are_reported(tmp_path, broken, caplog):
    write_version(tmp_path / "m", 1, scale(2))
    (tmp_path / "secret").mkdir()
    broken[tmp_path / "secret"] = errno.EACCES
    folders = check_repository(tmp_path)
    assert (folders.models, folders.unreadable) == (("m",), {"secret": "Permission denied"})
    assert "secret cannot be read, so that it is not known whether it is a model: Permission denied" in caplog.text
    with pytest.raises(StartupError, match="cannot be read: Permission denied"):
        check_repository(tmp_path / "secret")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_folder_with_an_error_is_unknown(tmp_path, broken, number):
    write_version(tmp_path / "m", 1, b"x")
    write_version(tmp_path / "m", 2, b"x")
    broken[tmp_path / "m/1"] = number
    files = scan_model(tmp_path / "m")
    assert (set(files.versions), files.unreadable) == ({2}, {1: os.strerror(number)})
    broken[tmp_path / "m"] = number
    for look in (lambda: scan_model(tmp_path / "m"), lambda: has_model(tmp_path, "m")):
        with pytest.raises(OSError, match=os.strerror(number)):
            look()
    assert scan_repository(tmp_path).unreadable == {"m": os.strerror(number)}
    broken[tmp_path] = number
    with pytest.raises(OSError, match=os.strerror(number)):
        scan_repository(tmp_path)


def test_links_to_nothing_are_not_gone(tmp_path):
    write_version(tmp_path / "m", 1, b"x")
    for name in ("2", "3"):
        os.symlink({"2": "nowhere", "3": "3"}[name], tmp_path / "m" / name)
    files = scan_model(tmp_path / "m")
    assert (set(files.versions), files.unreadable) == ({1}, dict.fromkeys((2, 3), "a link to nothing"))
    os.symlink("nowhere", tmp_path / "link")
    with pytest.raises(OSError, match="a link to nothing"):
        scan_model(tmp_path / "link")
    with pytest.raises(OSError, match="a link to nothing"):
        has_model(tmp_path, "link")
    assert scan_repository(tmp_path).models == ("m",)


def test_a_model_is_not_gone_if_the_repository_is(tmp_path):
    for path in (tmp_path / "gone/m", tmp_path / "link/m"):
        with pytest.raises(OSError, match="No such file"):
            scan_model(path)
        with pytest.raises(OSError, match="No such file"):
            has_model(path.parent, "m")
        if not (tmp_path / "link").is_symlink():
            os.symlink("nowhere", tmp_path / "link")


def test_a_link_to_nothing_in_a_version_is_one_of_its_files(tmp_path):
    folder = write_version(tmp_path, 1, b"one")
    seen = {scan_version(folder)}
    os.symlink("nowhere", folder / "model.onnx.data")
    os.symlink("loop", folder / "loop")
    seen.add(scan_version(folder))
    (folder / "nowhere").write_text("x")
    seen.add(scan_version(folder))
    assert len(seen) == 3


def test_links_to_folders_above_are_visited_once(tmp_path):
    folder = write_version(tmp_path, 1, b"one")
    for name in ("a", "b", "c"):
        os.symlink(".", folder / name)
    assert [line[0] for line in scan_version(folder)] == ["model.onnx"]


@pytest.mark.parametrize(
    "name",
    [
        ".#config.pbtxt", ".config.pbtxt.swp", ".nfs000001", ".DS_Store", "._model.onnx", "config.pbtxt~",
        "#config.pbtxt#", "~$config.pbtxt", "config.pbtxt.swp", "model.onnx.part", "desktop.ini",
    ],
)  # fmt: skip
def test_hidden_and_temporary_files_are_no_change(tmp_path, name):
    write_config(tmp_path / "m", "")
    folder = write_version(tmp_path / "m", 1, b"one")
    before = scan_model(tmp_path / "m")
    for place in (tmp_path / "m", folder):
        os.symlink("user@host.4711:1", place / name)
    assert scan_model(tmp_path / "m") == before
    write_config(tmp_path / "m", "max_batch_size: 2")
    assert scan_model(tmp_path / "m").own != before.own, "changes beside them are seen"


def test_folders_of_the_system_are_no_models(tmp_path, broken):
    for name in ("lost+found", "@eaDir"):
        write_version(tmp_path / name, 1, b"x")
    broken[tmp_path / "lost+found"] = errno.EACCES
    (tmp_path / os.fsdecode(b"caf\xe9") / "1").mkdir(parents=True)
    folders = scan_repository(tmp_path)
    assert (folders.models, folders.unreadable) == ((), {})
