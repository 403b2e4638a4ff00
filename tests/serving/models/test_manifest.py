"""Manifests are read and compared with the files beside them."""

import errno
import os

import numpy as np
import pytest

from serving.errors import LoadError, TransientLoadError
from serving.models.manifest import DEFAULT_TOLERANCE, Manifest, read_manifest, verify_digests
from serving.protocol.tensors import DATATYPES, TensorSpec
from tests.serving.model_files import write_version


def test_without_a_file_the_manifest_is_empty(tmp_path):
    manifest = read_manifest(tmp_path)
    assert manifest == Manifest()
    verify_digests(tmp_path, manifest)


def test_all_fields_of_a_manifest(tmp_path):
    tensors = {
        "inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, 1, 28, 28]}],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}],
        "golden_tolerance": 0.5,
    }
    golden = {"images": np.zeros((1, 2), np.uint8)}
    folder = write_version(tmp_path, 1, b"content", manifest=tensors, golden=golden)
    manifest = read_manifest(folder)
    verify_digests(folder, manifest)
    assert manifest.digests.keys() == {"model.onnx", "golden.npz"}
    assert manifest.inputs == [TensorSpec("images", DATATYPES["UINT8"], (-1, 1, 28, 28))]
    assert manifest.outputs == [TensorSpec("logits", DATATYPES["FP32"], (-1, 10))]
    assert manifest.golden_tolerance == 0.5


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_manifest_with_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "manifest.json").write_bytes('{\r\n"golden_tolerance": 0.5\r\n}'.encode(encoding))
    assert read_manifest(tmp_path).golden_tolerance == 0.5


def test_what_cannot_be_read_is_not_absent(tmp_path, broken):
    folder = write_version(tmp_path, 1, b"content", manifest={})
    manifest = read_manifest(folder)
    broken[folder / "model.onnx"] = errno.EIO
    with pytest.raises(TransientLoadError, match=r"names model\.onnx, which cannot be read: Input/output error"):
        verify_digests(folder, manifest)
    broken[folder / "manifest.json"] = errno.EIO
    with pytest.raises(TransientLoadError, match=r"manifest\.json cannot be read: Input/output error"):
        read_manifest(folder)
    broken.clear()
    (folder / "manifest.json").unlink()
    os.symlink("nowhere", folder / "manifest.json")
    with pytest.raises(TransientLoadError, match=r"manifest\.json cannot be read: a link to nothing"):
        read_manifest(folder)


def test_the_tolerance_has_a_default(tmp_path):
    folder = write_version(tmp_path, 1, b"content", manifest={})
    assert read_manifest(folder).golden_tolerance == DEFAULT_TOLERANCE


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"files": {"model.onnx": {}}}',
        '{"files": {"model.onnx": "abc"}}',
        '{"files": {"../../etc/passwd": {"sha256": "0"}}}',
        '{"files": {"..": {"sha256": "0"}}}',
        '{"inputs": [{"name": "x"}]}',
        '{"inputs": [{"name": "x", "datatype": "FP8", "shape": []}]}',
        '{"golden_tolerance": "small"}',
    ],
)
def test_an_invalid_manifest_is_reported_in_one_line(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(LoadError, match=r"^manifest\.json cannot be read: "):
        read_manifest(tmp_path)


def test_a_changed_byte_and_a_missing_file_are_detected(tmp_path):
    folder = write_version(tmp_path, 1, b"content", manifest={})
    manifest = read_manifest(folder)
    (folder / "model.onnx").write_bytes(b"c0ntent")
    with pytest.raises(LoadError, match=r"model\.onnx is damaged: its SHA-256 is \w{12}…, manifest\.json says \w{12}…"):
        verify_digests(folder, manifest)
    (folder / "model.onnx").unlink()
    with pytest.raises(LoadError, match=r"manifest\.json names model\.onnx, which cannot be read: No such file"):
        verify_digests(folder, manifest)
