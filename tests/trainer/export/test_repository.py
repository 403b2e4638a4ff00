"""Tests that versions appear complete and in order, and only beside compatible ones."""

import errno
import fcntl
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from convoy.printable import printable
from convoy.promotion import PROMOTION_FILE, pin, write_promotion
from trainer.errors import ConfigError, ExportError
from trainer.export import repository
from trainer.export.repository import RepositoryModel, _staging_folder

FILES = {"model.onnx": b"weights", "golden.npz": b"images"}


def publish(model: RepositoryModel, files: dict[str, bytes] = FILES) -> Path:
    return model.publish(files, lambda version: json.dumps({"version": version}).encode())


def test_a_version_holds_its_files_and_a_manifest_with_its_number(model: RepositoryModel) -> None:
    version = publish(model)
    assert version == model.path / "1"
    assert {path.name: path.read_bytes() for path in version.iterdir()} == {**FILES, "manifest.json": b'{"version": 1}'}
    assert sorted(path.name for path in model.path.iterdir()) == ["1", "config.pbtxt", "labels.txt"]
    assert (model.path / "labels.txt").read_text() == "0\n1\n2\n3\n4\n5\n6\n7\n8\n9\n"


@pytest.mark.parametrize("name", [b"caf\xe9", b"\xe9" * 255, b"n" * 255])
def test_the_repository_may_have_any_name_that_the_file_system_takes(
    name: bytes, model: RepositoryModel, tmp_path: Path
) -> None:
    version = publish(replace(model, repository=tmp_path / os.fsdecode(name)))
    assert version.parent.parent.name == os.fsdecode(name)
    assert (version / "manifest.json").read_bytes() == b'{"version": 1}'


def test_triton_reads_the_configuration(model: RepositoryModel) -> None:
    """Parses it with the messages of Triton's own client."""
    publish(model)
    config = text_format.Parse((model.path / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert config.name == "digits"
    assert config.backend == "onnxruntime"
    assert config.platform == "onnxruntime_onnx"
    assert config.default_model_filename == "model.onnx"
    assert config.max_batch_size == 256
    assert config.HasField("dynamic_batching")
    (images,) = config.input
    assert (images.name, images.data_type, list(images.dims)) == ("images", model_config_pb2.TYPE_UINT8, [1, 28, 28])
    assert [(output.name, output.data_type, list(output.dims), output.label_filename) for output in config.output] == [
        (name, model_config_pb2.TYPE_FP32, [10], "labels.txt") for name in ("logits", "probabilities")
    ]


@pytest.mark.parametrize(("size", "expected"), [(28, 256), (90, 256), (91, 128), (224, 32), (1024, 2), (5000, 1)])
def test_large_images_have_small_batches(model: RepositoryModel, size: int, expected: int) -> None:
    assert replace(model, image_shape=(3, size, size)).config().max_batch_size == expected


@pytest.mark.parametrize(("bits", "expected"), [(None, []), (16, []), (12, ["12"]), (8, ["8"])])
def test_the_configuration_has_the_significant_bits_of_16_bit_files(
    model: RepositoryModel, bits: int | None, expected: list[str]
) -> None:
    for _ in range(2):  # the second version is compatible with the first
        publish(replace(model, significant_bits=bits))
    publish(replace(model, significant_bits=None))  # so is one that was trained on files of 8 bits
    config = text_format.Parse((model.path / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert [parameter.string_value for parameter in config.parameters.values()] == expected


def test_the_next_version_follows_the_highest(model: RepositoryModel) -> None:
    publish(model)
    for name in ("41", "notes", ".staging-left-behind", "-5"):
        (model.path / name).mkdir()
    assert publish(model).name == "42"
    assert publish(model).name == "43"


def leave_unfinished(staged: Path, age_s: float) -> None:
    staged.mkdir()
    (staged / "model.onnx").write_bytes(b"some")
    os.utime(staged, (time.time() - age_s,) * 2)


def test_unfinished_files_of_a_killed_export_are_removed_by_the_next_one(model: RepositoryModel) -> None:
    publish(model)
    for name, age_s in {"killed": 120, "new": 10}.items():
        leave_unfinished(model.path / f".staging-{name}", age_s)
    with _staging_folder(model.path) as running:
        os.utime(running, (time.time() - 7200,) * 2)
        publish(model)
        assert {path.name for path in model.path.glob(".*")} == {".staging-new", running.name}


def test_without_locks_unfinished_files_are_removed_after_an_hour(
    model: RepositoryModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(_file: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    publish(model)
    for name, age_s in {"killed": 7200, "running": 120}.items():
        leave_unfinished(model.path / f".staging-{name}", age_s)
    publish(model)
    assert [path.name for path in model.path.glob(".*")] == [".staging-running"]


def test_an_export_leaves_a_pinned_version_in_service(model: RepositoryModel) -> None:
    publish(model)
    assert model.pinned() is None
    write_promotion(model.path, pin(None, 1, 1, [1]))
    publish(model)
    assert (model.pinned(), model.serving()) == (1, 1)
    (model.path / PROMOTION_FILE).write_text("{")
    assert model.pinned() is None


def test_simultaneous_exports_get_a_version_each(model: RepositoryModel) -> None:
    """Every thread waits before its rename until all have chosen the same number."""
    together, versions = threading.Barrier(4), []

    def build_manifest(version: int) -> bytes:
        if version == 1:
            together.wait(timeout=60)
        return json.dumps({"version": version}).encode()

    def export(content: bytes) -> None:
        versions.append(model.publish({"model.onnx": content}, build_manifest))

    threads = [threading.Thread(target=export, args=(str(number).encode(),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in versions) == ["1", "2", "3", "4"]
    assert {(path / "model.onnx").read_bytes() for path in versions} == {b"0", b"1", b"2", b"3"}
    assert all(json.loads((path / "manifest.json").read_text()) == {"version": int(path.name)} for path in versions)
    assert not list(model.path.glob(".*"))


def test_an_edited_configuration_is_kept(model: RepositoryModel) -> None:
    publish(model)
    path = model.path / "config.pbtxt"
    edited = path.read_text().replace("max_batch_size: 256", "max_batch_size: 8") + (
        "instance_group { count: 2 kind: KIND_CPU }\nversion_policy { all {} }\n"
    )
    path.write_text(edited)
    publish(model)
    assert path.read_text() == edited


DIFFERENT = {
    "another shape": ({"image_shape": (3, 28, 28)}, r"input images TYPE_UINT8 \[1, 28, 28\], the new version images "),
    "more classes": ({"labels": tuple("0123456789A")}, r"labels\.txt has 10 classes, the new version 11"),
    "other bits": ({"significant_bits": 12}, r"have 16 significant_bits in .*config\.pbtxt and 12 in the new version"),
    "another class": ({"labels": tuple("012345678X")}, r"class 9 is '9' in .*labels\.txt and 'X' in the new version"),
}


@pytest.mark.parametrize(("change", "message"), DIFFERENT.values(), ids=list(DIFFERENT))
def test_an_incompatible_model_is_refused(change: dict, message: str, model: RepositoryModel) -> None:  # type: ignore[type-arg]
    publish(model)
    other = replace(model, **change)
    for attempt in (other.check, lambda: publish(other)):
        with pytest.raises(ConfigError, match=message) as refused:
            attempt()
        assert "--name" in str(refused.value)
        assert "\n" not in str(refused.value)
    assert sorted(path.name for path in model.path.iterdir()) == ["1", "config.pbtxt", "labels.txt"]


def test_a_configuration_with_other_outputs_is_refused(model: RepositoryModel) -> None:
    publish(model)
    path = model.path / "config.pbtxt"
    path.write_text(path.read_text().replace('"logits"', '"scores"'))
    with pytest.raises(ConfigError, match=r"has output probabilities .*, scores .*, the new version logits "):
        model.check()


def test_a_configuration_that_cannot_be_parsed_is_named(model: RepositoryModel) -> None:
    publish(model)
    (model.path / "config.pbtxt").write_text("name = digits")
    with pytest.raises(ConfigError, match=r"config\.pbtxt cannot be read as a Triton configuration: 1:6"):
        model.check()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-int8", ".hidden", "a b", "a\n", "é"])
def test_an_invalid_name_is_refused(name: str, model: RepositoryModel) -> None:
    with pytest.raises(ConfigError, match="--name"):
        replace(model, name=name)


def test_class_names_are_one_printable_line() -> None:
    assert printable("a\nb\tc\udcff\u2028d é") == "a�b�c��d é"


def test_a_repository_that_is_a_file_is_an_error_of_one_line(model: RepositoryModel) -> None:
    model.repository.write_text("a file")
    for attempt in (model.check, lambda: publish(model)):
        with pytest.raises(ExportError, match="cannot write to the model repository") as refused:
            attempt()
        assert "\n" not in str(refused.value)


def test_a_folder_without_permission_is_refused_by_the_check(
    model: RepositoryModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.repository.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # not by chmod: root may write to every folder
    with pytest.raises(ExportError, match="is not writable for uid"):
        model.check()


def test_a_full_disk_leaves_no_partial_version(model: RepositoryModel, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(model)
    write = repository._write

    def write_until_full(path: Path, content: bytes) -> None:
        if path.name == "golden.npz":
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(repository, "_write", write_until_full)
    with pytest.raises(ExportError, match="No space left on device"):
        publish(model)
    assert sorted(path.name for path in model.path.iterdir()) == ["1", "config.pbtxt", "labels.txt"]
