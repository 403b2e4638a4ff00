"""The golden batch is read safely and compared with the model's outputs."""

import numpy as np
import pytest

from serving.errors import LoadError
from serving.models.golden import check_golden, read_golden
from serving.protocol.tensors import Array
from tests.serving.model_files import write_version
from tests.serving.models.recording_backend import RecordingBackend, double, make_spec


def test_without_a_file_the_golden_batch_is_empty(tmp_path):
    assert read_golden(tmp_path) == {}


def test_the_golden_batch_is_read_by_tensor_name(tmp_path):
    golden = {"images": np.zeros((1, 2), np.uint8)}
    assert read_golden(write_version(tmp_path, 1, b"content", golden=golden)).keys() == {"images"}


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
def test_a_damaged_file_is_reported_in_one_line(tmp_path, content):
    (tmp_path / "golden.npz").write_bytes(content)
    with pytest.raises(LoadError, match=r"^golden\.npz cannot be read: it is no \.npz file$"):
        read_golden(tmp_path)


def test_pickled_objects_are_rejected(tmp_path):
    np.savez(tmp_path / "golden.npz", x=np.array([{"a": 1}], object))
    with pytest.raises(LoadError, match=r"golden\.npz cannot be read: "):
        read_golden(tmp_path)


X = np.arange(14, dtype=np.float32).reshape(7, 2)


def test_a_golden_batch_larger_than_the_maximum_batch_size_runs_in_parts():
    spec = make_spec(3)
    backend = RecordingBackend(spec, double)
    check_golden(backend, spec, {"x": X, "y": 2 * X}, 1e-6)
    assert backend.shapes == [(3, 2), (3, 2), (1, 2)]


def test_a_golden_batch_without_batch_dimension():
    spec = make_spec(0, "[ 7, 2 ]")
    check_golden(RecordingBackend(spec, double), spec, {"x": X, "y": 2 * X}, 1e-6)
    with pytest.raises(LoadError, match="fails the golden check"):
        check_golden(RecordingBackend(spec, double), spec, {"x": X, "y": 3 * X}, 1e-6)


def wrong_in_the_last_row(x: Array) -> list[Array]:
    return [2 * x + (x >= 12) * np.float32(0.01)]


@pytest.mark.parametrize(
    ("function", "golden", "reason"),
    [
        (wrong_in_the_last_row, {"x": X, "y": 2 * X}, r"^the model fails the golden check: 'y' differs by 0\.01"),
        (lambda x: [x * np.float32("nan")], {"x": X, "y": 2 * X}, "differs by nan"),
        (double, {"x": X, "y": 2 * X[:5]}, "golden 'y' has shape"),
        (double, {"x": X, "y": 2 * X[:, :1]}, r"golden 'y' has shape \[3, 1\], the model's \[3, 2\]"),
        (double, {"y": X}, "the golden batch has no input 'x'"),
        (double, {"x": X, "other": X}, r"the golden batch has none of the outputs \['y'\]"),
        (double, {"x": X[:0], "y": X[:0]}, "the golden batch has no rows"),
        (double, {"x": X[0, 0], "y": X}, "the golden batch has no rows"),
        (double, {"x": X.astype(np.float64), "y": X}, "the golden input 'x' is float64"),
        (double, {"x": X[:, :1], "y": X}, r"the golden input 'x' is float32 of shape \[3, 1\]"),
        (double, {"x": X, "y": X.astype(str)}, "the golden 'y' cannot be compared: it does not hold numbers"),
    ],
)
def test_wrong_outputs_and_invalid_golden_batches_are_rejected(function, golden, reason):
    spec = make_spec(3)
    with pytest.raises(LoadError, match=reason):
        check_golden(RecordingBackend(spec, function), spec, golden, 1e-4)


def test_a_difference_within_the_tolerance_passes():
    spec = make_spec(3)
    check_golden(RecordingBackend(spec, wrong_in_the_last_row), spec, {"x": X, "y": 2 * X}, 0.02)
