"""The check of an instance that serves: what it runs, and what it finds."""

from typing import Any

import numpy as np
import pytest

from serving.errors import LoadError
from serving.inference.request_queue import BatchLimits
from serving.models.samples import Sample
from serving.models.self_check import make_check
from tests.serving.fake_repository import BlockingBackend, add_without_batch, backend_of, make_model, tensor, twice

X = np.arange(36, dtype=np.float32).reshape(12, 3)
GOLDEN = {"numbers": X, "twice": 2 * X, "more": X}


@pytest.fixture
def model() -> Any:
    made = twice(limits=BatchLimits(max_batch_size=8))
    yield made
    made.batcher.close()


@pytest.mark.parametrize(
    ("golden", "samples", "rows"),
    [(GOLDEN, [], 8), (GOLDEN, [Sample("a", 2, [X[:2]], 1)], 8), ({}, [Sample("a", 2, [X[:2]], 1)], 2), ({}, [], 1)],
    ids=["golden", "golden and sample", "sample", "zeros"],
)
def test_what_is_run(model: Any, golden: Any, samples: Any, rows: int) -> None:
    backend: BlockingBackend = backend_of(model)
    check = make_check(model.spec, golden, samples, 1e-3)
    assert check is not None
    check(backend)
    assert backend.batches == [rows]
    backend.function = lambda x: [x / "weights"]
    with pytest.raises(LoadError, match=f"the model fails on a batch of {rows} rows: "):
        check(backend)


def test_other_values_than_the_golden_ones_are_found(model: Any) -> None:
    backend = backend_of(model)
    check = make_check(model.spec, GOLDEN, [], 1e-3)
    assert check is not None
    backend.function = lambda x: [3 * x, x.sum(axis=1, keepdims=True)]
    with pytest.raises(LoadError, match="fails the golden check: 'twice' differs"):
        check(backend)


def test_without_a_batch_dimension_and_without_anything_known() -> None:
    unknown = add_without_batch()
    assert make_check(unknown.spec, {}, [], 0) is None, "its inputs have any length"
    tensors = [tensor("x", "FP32", 2, 3)], [tensor("y", "FP32", 2, 3)]
    fixed = make_model("fixed", lambda x: [x], tensors, limits=BatchLimits(max_batch_size=0))
    x = np.ones((2, 3), np.float32)
    for golden in ({}, {"x": x, "y": x}):
        check = make_check(fixed.spec, golden, [], 0)
        assert check is not None
        check(backend_of(fixed))
    for made in (unknown, fixed):
        made.batcher.close()
