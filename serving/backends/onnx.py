"""ONNX models through ONNX Runtime, on the CPU or on one GPU."""

import contextlib
import io
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from serving.backends.signature import ModelTensor, check_inputs, check_outputs
from serving.errors import LoadError, TransientLoadError
from serving.models.devices import CudaUnavailable
from serving.models.spec import ModelSpec
from serving.protocol.tensors import DATATYPES, Array, Datatype, TensorSpec

_ELEMENT_TYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}

_ERRORS_OF_THE_FILE = ("InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile", "NotImplemented")
"""ONNX Runtime's exceptions that the same file causes again; the others may be of memory or a device."""

_SAME_AS_REQUESTED = 1
"""ONNX Runtime's arena strategy `kSameAsRequested`; 0 is `kNextPowerOfTwo`."""

_FATAL = 4
"""ONNX Runtime's own lines would break JSON logs. Its exceptions say the same; its warnings are for developers."""

ort.set_default_logger_severity(_FATAL)

_once = threading.Lock()
"""Models are loaded at the same time; the arena is created, and the CUDA libraries are loaded, by the first."""


class OnnxBackend:
    """One session of ONNX Runtime.

    ONNX Runtime's Python interface takes strings as UTF-8. Invalid bytes are replaced by U+FFFD, so that the invalid
    string of one client does not fail the batch of all.

    Args:
        binds: bind inputs and outputs (IOBinding), as ONNX Runtime recommends for GPUs. On CPUs it saves no time.
    """

    def __init__(self, session: ort.InferenceSession, spec: ModelSpec, binds: bool) -> None:
        self._session: ort.InferenceSession | None = session
        self._input_names = [tensor.name for tensor in spec.inputs]
        self._output_names = [tensor.name for tensor in spec.outputs]
        self._has_strings = any(tensor.datatype.size == 0 for tensor in spec.inputs)
        self._binds = binds and not any(tensor.datatype.size == 0 for tensor in (*spec.inputs, *spec.outputs))

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        assert self._session is not None, "the backend is closed"
        if self._has_strings:
            inputs = [_decoded(array) if array.dtype == object else array for array in inputs]
        if self._binds:
            return self._run_bound(self._session, inputs)
        outputs: list[Array] = self._session.run(self._output_names, dict(zip(self._input_names, inputs, strict=True)))
        return outputs

    def _run_bound(self, session: ort.InferenceSession, inputs: Sequence[Array]) -> list[Array]:
        binding = session.io_binding()  # a new one, because it keeps its outputs, whose shapes differ with each batch
        for name, array in zip(self._input_names, inputs, strict=True):
            binding.bind_cpu_input(name, array)
        for name in self._output_names:
            binding.bind_output(name)
        session.run_with_iobinding(binding)
        outputs: list[Array] = binding.copy_outputs_to_cpu()
        return outputs

    def close(self) -> None:
        self._session = None


def load(file: Path, spec: ModelSpec, gpu: int | None, num_threads: int) -> OnnxBackend:
    """Opens one instance; a `serving.backends.registry.Load`.

    Raises:
        CudaUnavailable: ONNX Runtime cannot use the GPU.
        TransientLoadError: memory or a device are lacking now.
        LoadError: ONNX Runtime cannot load the file, or its tensors differ from the configuration.
    """
    session = _open(file, gpu, num_threads)
    check_inputs(spec.inputs, _tensors(session.get_inputs()))
    check_outputs(spec.outputs, _tensors(session.get_outputs()))
    return OnnxBackend(session, spec, binds=gpu is not None)


def describe(file: Path) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Returns the inputs and outputs of a model file.

    Raises:
        LoadError: ONNX Runtime cannot load the file, or a tensor has an unknown number of dimensions.
    """
    session = _open(file, None, 1)
    return _specs(session.get_inputs()), _specs(session.get_outputs())


def _open(file: Path, gpu: int | None, num_threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    # Threads that spin while they wait for the next batch would take CPU time from the front ends.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    # Memory plans for each batch size only enlarge the arena, by 30 MB for the MNIST convnet, and save no time. Without
    # them the arena stops growing once the largest batch has run, which is the first that warm-up runs.
    options.enable_mem_pattern = False
    if gpu is None:
        with _once:
            _register_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
    options.log_severity_level = _FATAL
    try:
        session = ort.InferenceSession(file, options, providers=_providers(gpu))
    except Exception as error:  # ONNX Runtime's own errors have no common class
        kind = LoadError if type(error).__name__ in _ERRORS_OF_THE_FILE else TransientLoadError
        reason = str(error).strip().partition("\n")[0]
        raise kind(f"ONNX Runtime cannot load {file.name}: {reason}") from error
    # Otherwise ONNX Runtime would print to standard output, continue on the CPU, and tell nobody.
    session.disable_fallback()
    if gpu is not None and "CUDAExecutionProvider" not in session.get_providers():
        raise CudaUnavailable(f"ONNX Runtime cannot use CUDA: {_preload_cuda() or 'it gives no reason'}")
    return session


@cache
def _register_arena() -> None:
    """Creates one memory arena for the sessions of all models, which grows by the size of each request.

    A session's own arena grows by powers of two: 17 MB more for the MNIST convnet with batches of up to 256, and no
    faster. Memory that an unloaded model frees stays in the shared arena for the other models.
    """
    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    defaults = {"max_mem": 0, "initial_chunk_size_bytes": -1, "max_dead_bytes_per_chunk": -1}
    ort.create_and_register_allocator(info, ort.OrtArenaCfg({"arena_extend_strategy": _SAME_AS_REQUESTED, **defaults}))


def _providers(gpu: int | None) -> list[Any]:
    if gpu is None:
        return ["CPUExecutionProvider"]
    with _once:
        _preload_cuda()
    cuda_options = {
        "device_id": gpu,
        "arena_extend_strategy": "kSameAsRequested",
        # The exhaustive search would run again for every batch size.
        "cudnn_conv_algo_search": "HEURISTIC",
        # The golden batch was computed in float32; TF32 differs by up to 1e-3.
        "use_tf32": 0,
    }
    return [("CUDAExecutionProvider", cuda_options), "CPUExecutionProvider"]


@cache
def _preload_cuda() -> str:
    """Loads the CUDA libraries from their Python packages. Returns the first line that ONNX Runtime prints about it."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(AttributeError):  # releases before 1.21 do not have it
        ort.preload_dlls()
    return output.getvalue().strip().partition("\n")[0]


def _tensors(nodes: Sequence[Any]) -> list[ModelTensor]:
    return [(node.name, _datatype(node), _shape(node)) for node in nodes]


def _specs(nodes: Sequence[Any]) -> list[TensorSpec]:
    specs = []
    for name, datatype, shape in _tensors(nodes):
        if shape is None:
            raise LoadError(f"the model does not define how many dimensions '{name}' has: list it in config.pbtxt")
        specs.append(TensorSpec(name, datatype, shape))
    return specs


def _datatype(node: Any) -> Datatype:
    if node.type not in _ELEMENT_TYPES:
        raise LoadError(f"the model's '{node.name}' is a {node.type}, a type that the protocol does not have")
    return DATATYPES[_ELEMENT_TYPES[node.type]]


def _shape(node: Any) -> tuple[int, ...] | None:
    """ONNX Runtime gives a name or None for an open size. It gives [] for scalars and for unknown ranks alike."""
    return tuple(size if isinstance(size, int) else -1 for size in node.shape) or None


def _decoded(array: Array) -> Array:
    decoded = np.empty(array.shape, object)
    decoded.ravel()[:] = [element.decode(errors="replace") for element in array.ravel()]
    return decoded
