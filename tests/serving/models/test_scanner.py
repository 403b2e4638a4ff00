"""Models and versions are recognised by name; changes of files are detected."""

import os

import pytest

from serving.errors import InvalidArgument, StartupError
from serving.models.scanner import check_name, check_repository, has_model, model_names, scan_model, scan_version
from tests.serving.model_files import scale, write_config, write_version


def test_models_are_visible_folders_with_a_configuration_or_a_version(tmp_path):
    write_version(tmp_path / "with-version", 1, b"x")
    write_config(tmp_path / "with-config", "")
    write_version(tmp_path / ".hidden", 1, b"x")
    write_version(tmp_path / "elsewhere/linked", 1, b"x")
    os.symlink(tmp_path / "elsewhere/linked", tmp_path / "link")
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "notes.txt").touch()
    assert model_names(tmp_path) == ["link", "with-config", "with-version"]
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
    assert with_two.versions == after.versions


def test_missing_folders_have_no_models_and_no_files(tmp_path):
    assert scan_model(tmp_path / "gone") is None
    assert scan_version(tmp_path / "gone") == ()
    assert model_names(tmp_path / "gone") == []


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


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_unreadable_folders_are_reported(tmp_path, caplog):
    write_version(tmp_path / "m", 1, scale(2))
    (tmp_path / "secret").mkdir(mode=0o000)
    check_repository(tmp_path)
    assert "no permission to read" in caplog.text
    with pytest.raises(StartupError, match="cannot be read: Permission denied"):
        check_repository(tmp_path / "secret")
