"""Valid inference requests at random, for the models of `tests.serving.onnx_models`, and what these models compute."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from protos import grpc_service_pb2 as pb
from serving.protocol.tensors import DATATYPES, Array, to_bytes
from tests.serving.onnx_models import LABELS, NUMBERS, PIXEL_WEIGHTS, WEIGHTS

VARIABLE = -1


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output of a model; `dims` without the batch dimension."""

    name: str
    datatype: str
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """A model, and how to compute it with numpy.

    Args:
        max_rows: 0 for a model without a batch dimension.
        compute: returns each output, and the error that its numbers may have (0 for none).
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    compute: Callable[..., list[tuple[Array, Array | float]]]
    max_rows: int = 8
    versions: tuple[str, ...] = ("1",)
    labels: Sequence[str] = ()


@dataclass(slots=True)
class Request:
    """An inference request that the server accepts.

    Args:
        outputs: names of the requested outputs, and how many classes of each (0 for the tensor).
    """

    model: str
    version: str
    id: str
    arrays: dict[str, Array]
    outputs: list[tuple[str, int]] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)


def _rows(x: Array) -> list[tuple[Array, Array | float]]:
    return [(x, 0.0), (x @ WEIGHTS, np.abs(x) @ np.abs(WEIGHTS) * 1e-5 + 1e-6)]


def _digits(images: Array) -> list[tuple[Array, Array | float]]:
    logits = images.reshape(len(images), -1).astype(np.float32) @ PIXEL_WEIGHTS
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return [(logits, 1e-3), ((weights / weights.sum(axis=1, keepdims=True)).astype(np.float32), 1e-3)]


def _pair(a: Array, b: Array) -> list[tuple[Array, Array | float]]:
    return [(a + b.astype(np.float32), 0.0), (b + b, 0.0)]


def _same(*arrays: Array) -> list[tuple[Array, Array | float]]:
    return [(array, 0.0) for array in arrays]


def _strings(text: Array) -> list[tuple[Array, Array | float]]:
    """ONNX Runtime's strings are UTF-8: `serving.backends.onnx` replaces bytes that are not."""
    array = np.empty(text.shape, object)
    array.ravel()[:] = [element.decode("utf-8", "replace").encode() for element in text.ravel()]
    return [(array, 0.0)]


def _whole(x: Array) -> list[tuple[Array, Array | float]]:
    return [(x + x, 0.0), (x.sum(keepdims=True), np.abs(x).sum() * 1e-5 + 1e-6)]


def _typed(names: Sequence[str]) -> Model:
    inputs, outputs = ([Tensor(f"{side}_{name}", name, (2,)) for name in names] for side in ("in", "out"))
    return Model(tuple(inputs), tuple(outputs), _same)


MODELS: dict[str, Model] = {
    "rows": Model((Tensor("x", "FP32", (4,)),), (Tensor("echo", "FP32", (4,)), Tensor("product", "FP32", (3,))), _rows),
    "digits": Model(
        (Tensor("images", "UINT8", (1, 4, 4)),),
        (Tensor("logits", "FP32", (10,)), Tensor("probabilities", "FP32", (10,))),
        _digits,
        max_rows=4,
        labels=LABELS,
    ),
    "pair": Model(
        (Tensor("a", "FP32", (2,)), Tensor("b", "INT64", (1,))),
        (Tensor("sum", "FP32", (2,)), Tensor("twice", "INT64", (1,))),
        _pair,
    ),
    "types": _typed(NUMBERS),
    "halves": _typed(["FP16"]),
    "strings": Model((Tensor("text", "BYTES", (VARIABLE,)),), (Tensor("echo", "BYTES", (VARIABLE,)),), _strings),
    "whole": Model(
        (Tensor("x", "FP32", (VARIABLE,)),),
        (Tensor("doubled", "FP32", (VARIABLE,)), Tensor("total", "FP32", (1,))),
        _whole,
        max_rows=0,
    ),
    "versions": Model(
        (Tensor("x", "FP32", (1,)),), (Tensor("y", "FP32", (1,)),), lambda x: [(x, 0.0)], versions=("1", "2")
    ),
}
"""`versions` adds the version's number, which `oracle` does."""

WORDS = (
    *MODELS,
    *dict.fromkeys(tensor.name for model in MODELS.values() for tensor in (*model.inputs, *model.outputs)),
    *DATATYPES,
    "BF16",
    *("0", "1", "2", "3", "01", "-1", "+1", " 1", "1.0", "9" * 30),
    *(
        "timeout",
        "priority",
        "classification",
        "shared_memory_region",
        "binary_data",
        "headers",
        "triton_x",
        "sequence_id",
        "triton_grpc_error",
    ),
)
"""Strings that mean something to the server. Without models that change or whose requests take long."""


def random_request(rng: random.Random) -> Request:
    """Returns a request for one of the models."""
    name = rng.choice(list(MODELS))
    model = MODELS[name]
    rows = (rng.randint(1, model.max_rows),) if model.max_rows else ()
    words = rng.randint(0, 4)
    arrays = {
        tensor.name: random_array(rng, tensor.datatype, (*rows, *(words if n == VARIABLE else n for n in tensor.dims)))
        for tensor in model.inputs
    }
    request = Request(name, rng.choice(["", "", *model.versions]), "", arrays)
    if rng.random() < 0.4:
        request.id = rng.choice(["1", "an id", "é" * 5, "x" * 200, str(rng.random())])
    if rng.random() < 0.5:
        chosen = rng.sample(model.outputs, rng.randint(1, len(model.outputs)))
        counts = (0, 0, 0, 1, 3, 100)
        request.outputs = [(o.name, 0 if o.datatype == "BYTES" else rng.choice(counts)) for o in chosen]
    if rng.random() < 0.1:
        request.parameters = rng.choice([{"timeout": 60_000_000}, {"my_key": "a value"}, {"a": True, "b": 1.5}])
    return request


def random_array(rng: random.Random, datatype: str, shape: tuple[int, ...]) -> Array:
    """Returns random values; a few floats are special."""
    count = int(np.prod(shape))
    kind = DATATYPES[datatype]
    if kind.dtype == object:
        array = np.empty(count, object)
        array[:] = [rng.choice([b"", b"one", b"\xff\xfe", "zwölf".encode(), b"x" * 300]) for _ in range(count)]
        return array.reshape(shape)
    if datatype == "BOOL":
        return np.frombuffer(rng.randbytes(count), np.uint8).reshape(shape) > 127
    if kind.dtype.kind in "iu":
        return np.frombuffer(rng.randbytes(count * kind.size), kind.dtype).reshape(shape)
    special = rng.random() < 0.05
    values = [
        rng.choice([float("nan"), float("inf"), -0.0, 6e4, 1e-45])
        if special and rng.random() < 0.3
        else rng.gauss(0, 3)
        for _ in range(count)
    ]
    return np.array(values, kind.dtype).reshape(shape)


def to_protobuf(request: Request, *, typed: bool) -> pb.ModelInferRequest:
    """Returns the request as a message, with typed or raw contents. FP16 has only raw contents."""
    message = pb.ModelInferRequest(model_name=request.model, model_version=request.version, id=request.id)
    for key, value in request.parameters.items():
        set_parameter(message.parameters[key], value)
    datatypes = {tensor.name: tensor.datatype for tensor in MODELS[request.model].inputs}
    for name, array in request.arrays.items():
        tensor = message.inputs.add(name=name, datatype=datatypes[name], shape=array.shape)
        contents = DATATYPES[datatypes[name]].contents
        if typed and contents is not None:
            getattr(tensor.contents, contents).extend(array.ravel().tolist())
        else:
            message.raw_input_contents.append(to_bytes(array))
    for name, classes in request.outputs:
        output = message.outputs.add(name=name)
        if classes:
            output.parameters["classification"].int64_param = classes
    return message


def set_parameter(parameter: pb.InferParameter, value: object) -> None:
    """Stores a value in the parameter's field for its type."""
    name = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
    setattr(parameter, name, value)
