"""Measures the time of a forward pass in PyTorch, TorchScript and ONNX Runtime, on the CPU."""

import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from trainer.models import Classifier

Runtime = Literal["eager", "torchscript", "onnxruntime"]
ForwardPass = Callable[[torch.Tensor], object]
"""Computes the logits of images uint8 `[B, 3, H, W]`."""
_MIN_REPEATS, _MAX_REPEATS, _MAX_WARM_UPS = 3, 50, 3


def prepare(runtime: Runtime, model: Classifier, image_size: int) -> ForwardPass:
    """Loads a model into a runtime. The model itself is not changed.

    Args:
        model: on the CPU, in evaluation mode.
        image_size: height and width in pixels.
    """
    return _PREPARE[runtime](model, image_size)


def measure(work: Callable[[], object], seconds: float) -> float:
    """Returns the median time of a call in seconds.

    The first calls are not counted, because TorchScript still optimises its code then.

    Args:
        work: the call to measure.
        seconds: time to measure. There are at least 3 and at most 50 calls.
    """
    began = time.perf_counter()
    for _ in range(_MAX_WARM_UPS):
        work()
        if time.perf_counter() - began > seconds:
            break
    times: list[float] = []
    while len(times) < _MIN_REPEATS or (sum(times) < seconds and len(times) < _MAX_REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _eager(model: Classifier, image_size: int) -> ForwardPass:
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # `to` changes a model in place

    def run(images: torch.Tensor) -> object:
        with torch.inference_mode():
            return model(images)

    return run


def _torchscript(model: Classifier, image_size: int) -> ForwardPass:
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # torch warns at every step that TorchScript is deprecated
        traced = torch.jit.freeze(torch.jit.trace(model, (_example(image_size),)))

    def run(images: torch.Tensor) -> object:
        with torch.inference_mode():
            return traced(images)

    return run


def _onnxruntime(model: Classifier, image_size: int) -> ForwardPass:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        dynamic = {"pixels": {0: torch.export.Dim("batch")}}
        torch.onnx.export(model, (_example(image_size),), path, dynamo=True, dynamic_shapes=dynamic, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images.numpy()})


def _example(image_size: int) -> torch.Tensor:
    return torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)


_PREPARE: dict[Runtime, Callable[[Classifier, int], ForwardPass]] = {
    "eager": _eager,
    "torchscript": _torchscript,
    "onnxruntime": _onnxruntime,
}
