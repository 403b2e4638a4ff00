"""A result as a run leaves it, for tests."""

from dataclasses import replace
from typing import Any

from trainer.records.result import Result

RESULT = Result(
    recipe="mnist",
    dataset="pets",
    dataset_sha256="d" * 64,
    model="lecture",
    num_parameters=105_506,
    world_size=1,
    device="cpu",
    precision="float32",
    seed=0,
    epochs=1,
    steps=90,
    global_batch_size=100,
    train_seconds=2.5,
    images_per_second=4000.0,
    val_accuracy=0.9,
    test_accuracy=0.91,
    test_errors=90,
    num_test=1000,
    test_interval=(0.89, 0.93),
    balanced_accuracy=0.9,
    recall_by_class={"cat": 0.92, "dog": 0.88},
    test_look=1,
    num_test_looks=1,
    test_accuracy_of_seeds={0: [0.91]},
    looks_by_dataset={"pets dddddddd": 1},
    weights_sha256="e" * 64,
    exported=None,
    machine={"device": "an abacus", "cpus": 2},
)


def make_result(**changes: Any) -> Result:
    return replace(RESULT, **changes)
