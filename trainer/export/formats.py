"""The three formats of an exported model: made, and opened again as a server would."""

import io
import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import nn

from convoy.cpus import num_available_cpus
from trainer.export.graph import clean
from trainer.export.repository import INPUT, LOGITS, ONNX, PROBABILITIES

TORCHSCRIPT, EXPORTED_PROGRAM = "model.pt", "model.pt2"

Floats = npt.NDArray[np.float32]
Answer = Callable[[npt.NDArray[np.uint8]], tuple[Floats, Floats]]
"""Logits and probabilities `[B, classes]` of images `[B, C, H, W]`."""


def convert(model: nn.Module, example: torch.Tensor) -> dict[str, bytes]:
    """The model in every format: the files' contents by their names.

    Args:
        model: images uint8 `[B, C, H, W]` to a tuple of logits and probabilities; on the CPU, in evaluation mode.
        example: images of the right shape, at least 2, because torch.export takes a batch of 1 for a constant.
    """
    with warnings.catch_warnings():
        # They say that TorchScript is deprecated, which is why there are two other formats.
        warnings.simplefilter("ignore")
        program = _to_program(model, example)
        return {
            TORCHSCRIPT: _to_torchscript(model, example),
            ONNX: _to_onnx(program),
            EXPORTED_PROGRAM: _to_exported_program(program),
        }


def convert_to_onnx(model: nn.Module, example: torch.Tensor) -> bytes:
    """The model in ONNX alone, as `convert` makes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _to_onnx(_to_program(model, example))


def open_format(name: str, content: bytes) -> Answer:
    """A model file, by its name, ready to answer: on the CPU, on as many threads as the container grants."""
    if name == ONNX:
        return _onnx_answer(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = io.BytesIO(content)
        return _torch_answer(torch.jit.load(file) if name == TORCHSCRIPT else torch.export.load(file).module())


def _to_program(model: nn.Module, example: torch.Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _to_torchscript(model: nn.Module, example: torch.Tensor) -> bytes:
    """Traced, without the records for debuggers, which hold the paths of this machine's source files."""
    traced = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, example, check_trace=False), traced)
    traced.seek(0)
    reader, kept = torch._C.PyTorchFileReader(traced), io.BytesIO()
    writer = torch._C.PyTorchFileWriter(kept)
    for name in reader.get_all_records():
        # The writer adds its own version, byte order and identity.
        if not name.endswith(".debug_pkl") and not name.startswith(("version", "byteorder", ".data/")):
            record = reader.get_record(name)
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    return kept.getvalue()


def _to_onnx(program: torch.export.ExportedProgram) -> bytes:
    exported = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=[INPUT], output_names=[LOGITS, PROBABILITIES]
    )
    assert exported is not None
    return clean(exported.model_proto)


def _to_exported_program(program: torch.export.ExportedProgram) -> bytes:
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # holds the paths of this machine's source files
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _onnx_answer(content: bytes) -> Answer:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_available_cpus()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def answer(images: npt.NDArray[np.uint8]) -> tuple[Floats, Floats]:
        logits, probabilities = session.run([LOGITS, PROBABILITIES], {INPUT: images})
        return logits, probabilities

    return answer


def _torch_answer(model: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> Answer:
    @torch.inference_mode()
    def answer(images: npt.NDArray[np.uint8]) -> tuple[Floats, Floats]:
        logits, probabilities = model(torch.from_numpy(images))
        return logits.numpy(), probabilities.numpy()

    return answer
