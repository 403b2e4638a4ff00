"""Warm-up runs every batch size and measures the best one."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from serving.errors import LoadError
from serving.models.warmup import warm_up
from serving.protocol.tensors import Array
from tests.serving.models.recording_backend import RecordingBackend, double, make_spec


@pytest.mark.parametrize(
    ("max_batch_size", "rows"), [(1, [1]), (2, [2, 1]), (6, [6, 4, 2, 1]), (8, [8, 4, 2, 1]), (9, [9, 8, 4, 2, 1])]
)
def test_every_power_of_two_and_the_largest_size_run_largest_first(max_batch_size, rows):
    spec = make_spec(max_batch_size)
    backend = RecordingBackend(spec, double)
    warm_up(backend, spec, {})
    assert backend.shapes == [(size, 2) for size in rows for _ in range(5)]


def test_a_model_without_batch_dimension_runs_with_its_own_shape():
    spec = make_spec(0, "[ 3, 2 ]")
    backend = RecordingBackend(spec, double)
    warm_up(backend, spec, {})
    assert set(backend.shapes) == {(3, 2)}


def test_a_model_with_open_sizes_runs_only_with_golden_inputs():
    spec = make_spec(4, "[ -1 ]")
    backend = RecordingBackend(spec, double)
    warm_up(backend, spec, {})
    assert backend.shapes == []
    warm_up(backend, spec, {"x": np.ones((3, 5), np.float32)})
    assert set(backend.shapes) == {(4, 5), (2, 5), (1, 5)}


def test_a_model_with_strings_and_no_golden_inputs_does_not_run():
    spec = make_spec(4, kind="TYPE_STRING")
    backend = RecordingBackend(spec, double)
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
        (lambda x: [], "expected a list of 1 arrays, got list of 0"),
        (lambda x: [x, x], "expected a list of 1 arrays, got list of 2"),
        (lambda x: [None], "output 'y' is NoneType"),
        (lambda x: sys.exit(3), "^the model fails on a batch of 6 rows: 3$"),
    ],
)
def test_a_model_that_fails_or_differs_from_the_configuration_is_rejected(function, reason):
    spec = make_spec()
    with pytest.raises(LoadError, match=reason):
        warm_up(RecordingBackend(spec, function), spec, {})


@pytest.mark.parametrize("unit_s", [0.001, 0.1])
def test_slow_runs_do_not_change_the_measured_batch_size(monkeypatch, unit_s):
    """A row costs two units, in batches of 8 four. All runs of a size but the fourth and the sixth take longer."""
    spec = make_spec(8)
    now_s = 0.0

    def busy(x: Array) -> list[Array]:
        nonlocal now_s
        run = backend.shapes.count(x.shape)
        now_s += unit_s * ((2 if len(x) < 8 else 4) * len(x) + (0 if run in (3, 5) else 20))
        return double(x)

    monkeypatch.setattr("serving.models.warmup.time", SimpleNamespace(perf_counter=lambda: now_s))
    backend = RecordingBackend(spec, busy)
    assert warm_up(backend, spec, {}).batch_size == 4
    assert backend.shapes.count((8, 2)) == (5 if unit_s < 0.01 else 3)
