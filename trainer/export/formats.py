"""Converts a model to TorchScript, ONNX and torch.export, and loads each format again as a server would.

The files hold nothing about the machine that made them: no paths, no stack traces.
"""

import io
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import TextIO

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from torch import nn

from convoy.cpus import num_available_cpus
from trainer.collector import paused_collector
from trainer.export.repository import INPUT, LOGITS, ONNX, PROBABILITIES
from trainer.hardware import without_tf32

TORCHSCRIPT, EXPORTED_PROGRAM = "model.pt", "model.pt2"

FloatArray = npt.NDArray[np.float32]
Predictor = Callable[[npt.NDArray[np.uint8]], tuple[FloatArray, FloatArray]]
"""Maps images `[B, C, H, W]` to logits and probabilities, both `[B, classes]`."""


def convert(model: nn.Module, example: torch.Tensor) -> dict[str, bytes]:
    """Converts a model to every format.

    Args:
        model: maps images uint8 `[B, C, H, W]` to logits and probabilities; on the CPU, in evaluation mode.
        example: at least 2 images: torch.export treats a batch size of 1 as a constant.

    Returns:
        The content of each file by its name.
    """
    with _converting():
        program = _to_program(model, example)
        return {
            TORCHSCRIPT: _to_torchscript(model, example),
            ONNX: _to_onnx(program),
            EXPORTED_PROGRAM: _to_exported_program(program),
        }


def convert_to_onnx(model: nn.Module, example: torch.Tensor) -> bytes:
    """Converts a model to ONNX alone, with the same result as `convert`."""
    with _converting():
        return _to_onnx(_to_program(model, example))


def load_predictor(name: str, content: bytes) -> Predictor:
    """Loads a model file on the CPU, with as many threads as the container grants CPUs.

    Args:
        name: the file's name, which decides the format.
        content: the file's content.
    """
    if name == ONNX:
        return _load_onnx(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = io.BytesIO(content)
        return _wrap_torch(torch.jit.load(file) if name == TORCHSCRIPT else torch.export.load(file).module())


def serialize_onnx(model: onnx.ModelProto) -> bytes:
    """Serialises an ONNX model without names of source files, stack traces and inferred shapes."""
    clean = onnx.ModelProto()
    clean.CopyFrom(model)
    graph = clean.graph
    for part in (clean, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    graph.ClearField("value_info")
    for tensor in (*graph.input, *graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_param = "batch"  # torch's own name for it varies between exports
    onnx.checker.check_model(clean, full_check=True)
    content: bytes = clean.SerializeToString(deterministic=True)
    return content


@contextmanager
def _converting() -> Iterator[None]:
    """Context of a conversion: imports torch's compiler, and makes some hundred thousand objects."""
    with paused_collector(), warnings.catch_warnings():
        # torch warns that TorchScript is deprecated; the other two formats are there for that reason.
        warnings.simplefilter("ignore")
        yield


@contextmanager
def muted_thread() -> Iterator[None]:
    """Context in which this thread prints no errors. Others do: the watchdog names a rank that fails."""
    with redirect_stderr(_OtherThreads(sys.stderr, threading.get_ident())):
        yield


class _OtherThreads(io.TextIOBase):
    """Standard error without what one thread writes."""

    def __init__(self, stream: TextIO, muted: int) -> None:
        self._stream, self._muted = stream, muted

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._muted else self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()


def _to_program(model: nn.Module, example: torch.Tensor) -> torch.export.ExportedProgram:
    with muted_thread():  # torch prints the graph of a network that it cannot export
        return torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _to_torchscript(model: nn.Module, example: torch.Tensor) -> bytes:
    """Traces a model and drops the debug records, which hold the paths of this machine's source files."""
    traced = io.BytesIO()
    with without_tf32():  # a traced convolution keeps the setting: with TF32, logits on a GPU are off by up to 0.003
        torch.jit.save(torch.jit.trace(model, example, check_trace=False), traced)
    traced.seek(0)
    reader, stripped = torch._C.PyTorchFileReader(traced), io.BytesIO()
    writer = torch._C.PyTorchFileWriter(stripped)
    for name in reader.get_all_records():
        if name.endswith("version"):  # of the operators, by which a loader knows their arguments
            writer.set_min_version(int(reader.get_record(name)))
        # The writer adds its own version, byte order and id.
        if not name.endswith(".debug_pkl") and not name.startswith(("version", "byteorder", ".data/")):
            record = reader.get_record(name)
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    return stripped.getvalue()


def _to_onnx(program: torch.export.ExportedProgram) -> bytes:
    exported = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=[INPUT], output_names=[LOGITS, PROBABILITIES]
    )
    assert exported is not None
    return serialize_onnx(exported.model_proto)


def _to_exported_program(program: torch.export.ExportedProgram) -> bytes:
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # holds the paths of this machine's source files
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _load_onnx(content: bytes) -> Predictor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_available_cpus()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def predict(images: npt.NDArray[np.uint8]) -> tuple[FloatArray, FloatArray]:
        logits, probabilities = session.run([LOGITS, PROBABILITIES], {INPUT: images})
        return logits, probabilities

    return predict


def _wrap_torch(model: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> Predictor:
    @torch.inference_mode()
    def predict(images: npt.NDArray[np.uint8]) -> tuple[FloatArray, FloatArray]:
        logits, probabilities = model(torch.from_numpy(images))
        return logits.numpy(), probabilities.numpy()

    return predict
