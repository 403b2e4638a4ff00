"""The feature maps of an ONNX classifier's first layers, from a session that has their outputs, too.

The session opens when a page asks for the maps, beside the instances that serve, on one CPU thread. The file stays as
it is: Protocol Buffers merge messages that follow each other, so outputs can be appended to the file's bytes in memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from protos import onnx_graph_pb2 as pb
from serving.errors import InvalidArgument

MAX_FILE_BYTES = 256 << 20
MAX_LAYERS = 6
MAX_MAPS = 64
"""Of one layer; it may have more."""
MAX_SIDE = 64
"""Of a map; of larger ones, each k-th row and column is returned."""
MAX_FILTER_VALUES = 1 << 14

_SLIDING = ("Conv", "MaxPool", "AveragePool")
_ACTIVATIONS = ("Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSwish", "HardSigmoid", "Elu", "Selu", "Gelu")
_POINTWISE = (*_ACTIVATIONS, "Cast", "Add", "Sub", "Mul", "Div", "BatchNormalization", "Identity", "Dropout", "Concat")
_FLOAT = 1

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class ReceptiveField:
    """The pixels of the image that one value of a map depends on: `size` of them, from `start + stride * index` on.

    Args:
        size, stride, start: by rows and columns.
    """

    size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    start: tuple[int, int] = (0, 0)

    def after(self, node: pb.Node) -> "ReceptiveField":
        """Returns the receptive field of a layer that slides a window over this one."""
        attributes = {attribute.name: attribute for attribute in node.attribute}
        kernel = _pair(attributes, "kernel_shape", 1)
        strides, dilations, pads = (_pair(attributes, name, default) for name, default in _DEFAULTS)
        rows, columns = (
            (
                self.size[axis] + (kernel[axis] - 1) * dilations[axis] * self.stride[axis],
                self.stride[axis] * strides[axis],
                self.start[axis] - pads[axis] * self.stride[axis],
            )
            for axis in (0, 1)
        )
        return ReceptiveField((rows[0], columns[0]), (rows[1], columns[1]), (rows[2], columns[2]))


_DEFAULTS = (("strides", 1), ("dilations", 1), ("pads", 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The feature maps that one layer computes of an image.

    Args:
        operation: in ONNX's words.
        num_maps: of the layer, of which `maps` has the first.
        maps: [N, H, W].
        filters: of a first convolution, [N, C, H, W]; None for any other layer.
    """

    operation: str
    field: ReceptiveField
    num_maps: int
    maps: Array
    filters: Array | None


class OnnxLayers:
    """A session of a model's first layers.

    Args:
        file: of the model.

    Raises:
        InvalidArgument: the model has no layers that can be shown.
    """

    def __init__(self, file: Path) -> None:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise InvalidArgument(f"the layers of models over {MAX_FILE_BYTES >> 20} MiB are not shown")
        content = file.read_bytes()
        try:
            graph = pb.Model.FromString(content).graph
        except DecodeError as error:
            raise InvalidArgument("the layers of this model cannot be shown: its file is damaged") from error
        given = {tensor.name for tensor in graph.initializer}
        self._layers = list(_first_layers(graph, given))
        if not self._layers:
            raise InvalidArgument("the model has no convolution or pooling near its input: there are no maps to show")
        self._filters = {tensor.name: _values(tensor) for tensor in graph.initializer if _is_filter(tensor)}
        before = {value.name for value in graph.output}
        wanted = [node.output[0] for node, _ in self._layers if node.output[0] not in before]
        added = pb.Model(graph=pb.Graph(output=[pb.Value(name=name) for name in wanted]))
        self._session = _open(content + added.SerializeToString())

    def run(self, image: Array) -> list[Layer]:
        """Returns the layers' maps of an image, [1, C, H, W]; those whose outputs are no maps are left out."""
        names = [node.output[0] for node, _ in self._layers]
        outputs = self._session.run(names, {self._session.get_inputs()[0].name: image})
        return [
            self._layer(node, field, output[0])
            for (node, field), output in zip(self._layers, outputs, strict=True)
            if output.ndim == 4
        ]

    def _layer(self, node: pb.Node, field: ReceptiveField, output: Array) -> Layer:
        step = max(1, -(-max(output.shape[1:]) // MAX_SIDE))
        maps = np.ascontiguousarray(output[:MAX_MAPS, ::step, ::step], np.float32)
        if step > 1:
            field = replace(field, stride=(field.stride[0] * step, field.stride[1] * step))
        filters = self._filters.get(node.input[1]) if node.op_type == "Conv" and len(node.input) > 1 else None
        if filters is not None and filters.shape[1] not in (1, 3):
            filters = None
        return Layer(operation=node.op_type, field=field, num_maps=len(output), maps=maps, filters=filters)


def _first_layers(graph: pb.Graph, given: set[str]) -> Iterator[tuple[pb.Node, ReceptiveField]]:
    """Yields the first layers that slide over the image, and the activations after them, with their fields.

    Args:
        given: names of the weights.
    """
    fields: dict[str, ReceptiveField] = {}
    num_layers = 0
    for node in graph.node:
        inputs = [name for name in node.input if name and name not in given]
        known = [fields[name] for name in inputs if name in fields]
        if not known and len(inputs) == 1 and not fields:
            known = [ReceptiveField()]  # the image itself
        if not known or len(known) < len(inputs) or node.op_type not in (*_SLIDING, *_POINTWISE):
            continue
        field = max(known, key=lambda each: each.size)
        fields[node.output[0]] = field = field.after(node) if node.op_type in _SLIDING else field
        if node.op_type in _SLIDING or (node.op_type in _ACTIVATIONS and num_layers):
            yield node, field
            num_layers += 1
            if num_layers == MAX_LAYERS:
                return


def _pair(attributes: Mapping[str, pb.Attribute], name: str, default: int) -> tuple[int, int]:
    """Returns an attribute's value for rows and columns."""
    found: Sequence[int] = attributes[name].ints if name in attributes else ()
    return (found[0], found[1]) if len(found) >= 2 else (default, default)


def _is_filter(tensor: pb.Tensor) -> bool:
    size = int(np.prod(tensor.dims, dtype=np.int64))
    is_small = len(tensor.dims) == 4 and size <= MAX_FILTER_VALUES
    return is_small and tensor.data_type == _FLOAT and len(tensor.raw_data) == 4 * size


def _values(tensor: pb.Tensor) -> Array:
    return np.frombuffer(tensor.raw_data, "<f4").reshape(tuple(tensor.dims))


def _open(model: bytes) -> Any:
    """Opens a model on one CPU thread."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own errors have no common class
        reason = str(error).strip().partition("\n")[0][:300]
        raise InvalidArgument(f"the layers of this model cannot be shown: {reason}") from error
