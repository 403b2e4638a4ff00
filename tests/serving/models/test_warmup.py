"""An instance is proven before it serves: every batch size runs, and the golden batch is answered right."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from google.protobuf import text_format

from protos.model_config_pb2 import ModelConfig
from serving.errors import LoadError
from serving.models.config import ModelSpec, to_spec
from serving.models.warmup import check_golden, warm_up
from serving.protocol.tensors import Array


class Recorder:
    """A backend of one function that notes the shapes it is given."""

    def __init__(self, spec: ModelSpec, function: Callable[..., Sequence[Array]]) -> None:
        self.inputs, self.outputs = spec.inputs, spec.outputs
        self.shapes: list[tuple[int, ...]] = []
        self._function = function

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        self.shapes.append(inputs[0].shape)
        return list(self._function(*inputs))

    def close(self) -> None:
        pass


def make_spec(max_batch_size: int = 6, dims: str = "[ 2 ]", kind: str = "TYPE_FP32") -> ModelSpec:
    text = f"""max_batch_size: {max_batch_size}
    input {{ name: "x" data_type: {kind} dims: {dims} }} output {{ name: "y" data_type: TYPE_FP32 dims: {dims} }}"""
    return to_spec(text_format.Parse(text, ModelConfig()))


def double(x: Array) -> list[Array]:
    return [2 * x]


@pytest.mark.parametrize(
    ("max_batch_size", "rows"), [(1, [1]), (2, [2, 1]), (6, [6, 4, 2, 1]), (8, [8, 4, 2, 1]), (9, [9, 8, 4, 2, 1])]
)
def test_every_power_of_two_and_the_largest_are_warmed_largest_first(max_batch_size, rows):
    spec = make_spec(max_batch_size)
    backend = Recorder(spec, double)
    warm_up(backend, spec, {})
    assert backend.shapes == [(size, 2) for size in rows for _ in range(5)]


def test_a_model_without_batch_dimension_is_warmed_with_its_own_shape():
    spec = make_spec(0, "[ 3, 2 ]")
    backend = Recorder(spec, double)
    warm_up(backend, spec, {})
    assert set(backend.shapes) == {(3, 2)}


def test_open_sizes_are_warmed_with_golden_inputs_alone():
    spec = make_spec(4, "[ -1 ]")
    backend = Recorder(spec, double)
    warm_up(backend, spec, {})
    assert backend.shapes == []
    warm_up(backend, spec, {"x": np.ones((3, 5), np.float32)})
    assert set(backend.shapes) == {(4, 5), (2, 5), (1, 5)}


def test_strings_are_not_made_up():
    spec = make_spec(4, kind="TYPE_STRING")
    backend = Recorder(spec, double)
    warm_up(backend, spec, {})
    assert backend.shapes == []


def raises(x: Array) -> list[Array]:
    if len(x) == 4:
        raise RuntimeError("no kernel\nfor this")
    return double(x)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (raises, "^the model fails on a batch of 4 rows: no kernel$"),
        (lambda x: [x.astype(np.float64)], r"output 'y' is float64 of shape \[6, 2\].* says FP32 of shape \[6, 2\]"),
        (lambda x: [x[:, :1]], r"output 'y' is float32 of shape \[6, 1\]"),
        (lambda x: [x[:1]], r"output 'y' is float32 of shape \[1, 2\]"),
    ],
)
def test_a_model_that_fails_or_answers_in_another_form_is_refused(function, reason):
    spec = make_spec()
    with pytest.raises(LoadError, match=reason):
        warm_up(Recorder(spec, function), spec, {})


X = np.arange(14, dtype=np.float32).reshape(7, 2)


def test_a_golden_batch_larger_than_a_batch_goes_in_parts():
    spec = make_spec(3)
    backend = Recorder(spec, double)
    check_golden(backend, spec, {"x": X, "y": 2 * X}, 1e-6)
    assert backend.shapes == [(3, 2), (3, 2), (1, 2)]


def test_a_golden_batch_without_batch_dimension():
    spec = make_spec(0, "[ 7, 2 ]")
    check_golden(Recorder(spec, double), spec, {"x": X, "y": 2 * X}, 1e-6)
    with pytest.raises(LoadError, match="answered wrong"):
        check_golden(Recorder(spec, double), spec, {"x": X, "y": 3 * X}, 1e-6)


def wrong_in_the_last_row(x: Array) -> list[Array]:
    return [2 * x + (x >= 12) * np.float32(0.01)]


@pytest.mark.parametrize(
    ("function", "golden", "reason"),
    [
        (wrong_in_the_last_row, {"x": X, "y": 2 * X}, r"^the golden batch is answered wrong: 'y' differs by 0\.01"),
        (lambda x: [x * np.float32("nan")], {"x": X, "y": 2 * X}, "differs by nan"),
        (double, {"x": X, "y": 2 * X[:5]}, "golden 'y' has shape"),
        (double, {"x": X, "y": 2 * X[:, :1]}, r"golden 'y' has shape \[3, 1\], the model's answer \[3, 2\]"),
        (double, {"y": X}, "the golden batch has no input 'x'"),
        (double, {"x": X, "other": X}, r"the golden batch has none of the outputs \['y'\]"),
        (double, {"x": X[:0], "y": X[:0]}, "the golden batch has no rows"),
        (double, {"x": X[0, 0], "y": X}, "the golden batch has no rows"),
        (double, {"x": X.astype(np.float64), "y": X}, "the golden input 'x' is float64"),
        (double, {"x": X[:, :1], "y": X}, r"the golden input 'x' is float32 of shape \[3, 1\]"),
        (double, {"x": X, "y": X.astype(str)}, "the golden 'y' cannot be compared: it holds no numbers"),
    ],
)
def test_wrong_answers_and_wrong_golden_batches_are_refused(function, golden, reason):
    spec = make_spec(3)
    with pytest.raises(LoadError, match=reason):
        check_golden(Recorder(spec, function), spec, golden, 1e-4)


def test_a_difference_within_the_tolerance_passes():
    spec = make_spec(3)
    check_golden(Recorder(spec, wrong_in_the_last_row), spec, {"x": X, "y": 2 * X}, 0.02)


@pytest.mark.parametrize("unit_s", [0.001, 0.1])
def test_the_rows_that_are_computed_best_are_not_hidden_by_slow_runs(monkeypatch, unit_s):
    """Each size takes two units a row, and 8 rows four; the first two runs and every other one after take longer."""
    spec = make_spec(8)
    now_s = 0.0

    def busy(x: Array) -> list[Array]:
        nonlocal now_s
        run = backend.shapes.count(x.shape)
        now_s += unit_s * ((2 if len(x) < 8 else 4) * len(x) + (0 if run in (3, 5) else 20))
        return double(x)

    monkeypatch.setattr("serving.models.warmup.time", SimpleNamespace(perf_counter=lambda: now_s))
    backend = Recorder(spec, busy)
    assert warm_up(backend, spec, {}) == 4
    assert backend.shapes.count((8, 2)) == (5 if unit_s < 0.01 else 3)
