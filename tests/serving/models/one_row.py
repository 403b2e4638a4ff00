"""A request of one row, straight to a model's batcher."""

import threading
from typing import Any

from serving.errors import ServingError
from serving.inference.batch import QueuedRequest
from serving.inference.outputs import Outputs
from serving.models.loader import Model
from serving.protocol.tensors import Array

TIMEOUT_S = 60


class OneRow(QueuedRequest):
    """A request that a test can wait for. `outputs` is a list for each output, or the error."""

    def __init__(self, *arrays: Array) -> None:
        super().__init__(tuple(array.tobytes() for array in arrays), tuple(a.shape for a in arrays), 1, None)
        self.answered = threading.Event()
        self.outputs: Any = None

    def finish(self, outputs: Outputs, first_row: int) -> None:
        self.outputs = [outputs.slice(index, first_row, 1).tolist() for index in range(len(outputs.arrays))]
        self.answered.set()

    def fail(self, error: ServingError) -> None:
        self.outputs = error
        self.answered.set()


def infer(model: Model, *arrays: Array) -> Any:
    """Returns the outputs for one row; the error if the model fails."""
    job = OneRow(*arrays)
    model.batcher.submit(job)
    assert job.answered.wait(TIMEOUT_S)
    return job.outputs
