"""How one shape of request runs on one model version: checked once, used for every request that looks the same.

A plan knows the model and the shapes of a request, not its data: which tensor goes where, how many bytes each must
have, which outputs are wanted, and how the answer begins on the wire.
"""

from collections.abc import Sequence

import numpy as np

from protos.grpc_service_pb2 import ModelInferResponse
from serving.errors import InvalidArgument, quote
from serving.inference.batcher import Outputs
from serving.inference.request import InferInput, InferOutput, InferRequest, InferResponse
from serving.models.repository import Model
from serving.protocol.tensors import Array, Buffer, Elements, Shape, TensorSpec, num_elements, to_array, to_bytes

_RAW_OUTPUT = b"\x32"  # field 6, raw_output_contents, length-delimited


class Plan:
    """What is the same for all requests with these input names, types and shapes and these wanted outputs.

    Args:
        rows: of the batch dimension; 1 for a model without.
        shapes: of the inputs, in the model's order.
        has_strings: whether the size of an input depends on its content.
    """

    __slots__ = ("_head", "_order", "_sizes", "_wanted", "has_strings", "model", "rows", "shapes")

    def __init__(self, model: Model, request: InferRequest) -> None:
        """Check all of a request but its data.

        Raises:
            InvalidArgument: it does not fit the model.
        """
        specs = model.spec.inputs
        self.model = model
        self._order = _order_of_inputs(model, request.inputs)
        inputs = [request.inputs[at] for at in self._order]
        for spec, given in zip(specs, inputs, strict=True):
            _check_input(model, spec, given)
        self.shapes = tuple(given.shape for given in inputs)
        self.rows = _num_rows(model, self.shapes)
        self.has_strings = any(spec.datatype.size == 0 for spec in specs)
        self._sizes = [
            num_elements(given.shape) * spec.datatype.size for spec, given in zip(specs, inputs, strict=True)
        ]
        self._wanted = _wanted_outputs(model, request)
        # The shapes and the head that tells them, as one value: the threads of all instances read and replace it.
        self._head: tuple[list[Shape], bytes, list[tuple[int, int, bytes]]] = ([], b"", [])

    def bind_inputs(self, data: Sequence[Buffer | Elements]) -> tuple[Buffer, ...]:
        """The inputs' bytes in the model's order, from the request's order.

        Raises:
            InvalidArgument: a tensor has another number of bytes, or elements, than its shape needs, or an element does
                not fit its data type.
        """
        arranged: list[Buffer] = []
        for spec, shape, size, at in zip(self.model.spec.inputs, self.shapes, self._sizes, self._order, strict=True):
            given = data[at]
            try:
                buffer = given.to_bytes(shape) if isinstance(given, Elements) else given
            except InvalidArgument as error:
                raise InvalidArgument(f"{_of(self.model, spec)}: {error}") from error
            arranged.append(buffer)
            if spec.datatype.size == 0:
                to_array(spec.datatype, shape, buffer)
            elif len(buffer) != size:
                raise InvalidArgument(
                    f"{_of(self.model, spec)}: expected {size} bytes for {spec.datatype.name} of shape {list(shape)}, "
                    f"got {len(buffer)}"
                )
        return tuple(arranged)

    def encode(self, outputs: Outputs, first_row: int, id_field: bytes) -> bytes:
        """The serialised ModelInferResponse for this request's rows of a batch.

        Args:
            id_field: the request's id as that field of the message; empty for none.
        """
        shapes, head, fields = self._head
        if outputs.row_shapes != shapes:
            head, fields = self._make_head(outputs), self._make_fields(outputs)
            self._head = outputs.row_shapes, head, fields
        parts = [head, id_field]
        for index, top_k, field in fields:
            if field:
                parts += (field, outputs.data(index, first_row, self.rows))
            else:
                data = self._data(outputs, index, top_k, first_row)
                parts += (_RAW_OUTPUT, varint(len(data)), data)
        return b"".join(parts)

    def build_response(self, outputs: Outputs, first_row: int, request_id: str) -> InferResponse:
        """The same as values."""
        answers = []
        for index, top_k in self._wanted:
            datatype, shape = self._kind(outputs, index, top_k)
            data = self._data(outputs, index, top_k, first_row)
            answers.append(InferOutput(self.model.spec.outputs[index].name, datatype, shape, data))
        return InferResponse(self.model.spec.name, self.model.version, request_id, answers)

    def _data(self, outputs: Outputs, index: int, top_k: int, first_row: int) -> bytes:
        if not top_k:
            return outputs.data(index, first_row, self.rows)
        rows = outputs.slice(index, first_row, self.rows).reshape(self.rows, -1)
        return to_bytes(classify(rows, top_k, self.model.labels.get(self.model.spec.outputs[index].name, [])))

    def _kind(self, outputs: Outputs, index: int, top_k: int) -> tuple[str, Shape]:
        """The data type and shape of this request's part of an output."""
        row_shape = outputs.row_shapes[index]
        datatype = self.model.spec.outputs[index].datatype.name
        if top_k:
            datatype, row_shape = "BYTES", (min(top_k, num_elements(row_shape)),)
        return datatype, (self.rows, *row_shape) if self.model.spec.max_batch_size else row_shape

    def _make_fields(self, outputs: Outputs) -> list[tuple[int, int, bytes]]:
        """Of each wanted output its index, its number of classes, and how its field begins, if its size is known."""
        fields = []
        for index, top_k in self._wanted:
            array = outputs.arrays[index]
            is_known = not top_k and array.dtype != object
            size = num_elements(outputs.row_shapes[index]) * self.rows * array.itemsize
            fields.append((index, top_k, _RAW_OUTPUT + varint(size) if is_known else b""))
        return fields

    def _make_head(self, outputs: Outputs) -> bytes:
        head = ModelInferResponse(model_name=self.model.spec.name, model_version=self.model.version)
        for index, top_k in self._wanted:
            datatype, shape = self._kind(outputs, index, top_k)
            head.outputs.add(name=self.model.spec.outputs[index].name, datatype=datatype, shape=shape)
        encoded: bytes = head.SerializeToString()
        return encoded


def classify(rows: Array, top_k: int, labels: Sequence[str]) -> Array:
    """The largest values of each row as strings `value:index:label` (Triton's classification extension).

    Args:
        rows: numbers `[N, M]`.
        labels: of the M places; the label is left out where there is none.

    Returns:
        objects (bytes) `[N, min(top_k, M)]`, largest first; of equal values the first place comes first.
    """
    top_k = min(top_k, rows.shape[1])
    best = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :top_k]
    strings = np.empty(best.shape, object)
    for place, at in np.ndenumerate(best):
        index = int(at)
        label = f":{labels[index]}" if index < len(labels) else ""
        strings[place] = f"{rows[place[0], index]:f}:{index}{label}".encode()
    return strings


def varint(number: int) -> bytes:
    """A non-negative integer in protobuf's base-128 form."""
    if number < 128:
        return _SHORT[number]
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    parts.append(number)
    return bytes(parts)


_SHORT = [bytes([number]) for number in range(128)]


def _of(model: Model, spec: TensorSpec) -> str:
    return f"input '{spec.name}' of model '{model.spec.name}'"


def _order_of_inputs(model: Model, inputs: Sequence[InferInput]) -> tuple[int, ...]:
    """Where each of the model's inputs stands in the request."""
    places = {given.name: at for at, given in enumerate(inputs)}
    wanted = [spec.name for spec in model.spec.inputs]
    for name in places.keys() - set(wanted):
        raise InvalidArgument(f"model '{model.spec.name}' has no input {quote(name)}: it expects {_names(wanted)}")
    if len(places) != len(inputs):
        raise InvalidArgument(f"an input is given twice: expected each of {_names(wanted)} once")
    if missing := [name for name in wanted if name not in places]:
        raise InvalidArgument(
            f"model '{model.spec.name}' expected {len(wanted)} inputs, got {len(inputs)}: {_names(missing)} is missing"
        )
    return tuple(places[name] for name in wanted)


def _check_input(model: Model, spec: TensorSpec, given: InferInput) -> None:
    if given.datatype != spec.datatype.name:
        raise InvalidArgument(
            f"{_of(model, spec)}: data-type is {quote(given.datatype)}, but the model expects '{spec.datatype.name}'"
        )
    if not spec.accepts(given.shape) or min(given.shape, default=0) < 0:
        raise InvalidArgument(
            f"{_of(model, spec)}: unexpected shape, expected {list(spec.shape)}, got {quote(list(given.shape))}"
        )


def _num_rows(model: Model, shapes: Sequence[Shape]) -> int:
    limit = model.spec.max_batch_size
    if not limit:
        return 1
    rows = shapes[0][0]
    if any(shape[0] != rows for shape in shapes):
        raise InvalidArgument(
            f"the inputs of model '{model.spec.name}' differ in their batch dimension: {[shape[0] for shape in shapes]}"
        )
    if not 1 <= rows <= limit:
        raise InvalidArgument(
            f"inference request batch-size must be between 1 and {limit} for model '{model.spec.name}', got {rows}"
        )
    return rows


def _wanted_outputs(model: Model, request: InferRequest) -> tuple[tuple[int, int], ...]:
    """Index and number of classes (0: the tensor itself) of each output in the answer."""
    specs = model.spec.outputs
    if not request.outputs:
        return tuple((index, 0) for index in range(len(specs)))
    places = {spec.name: index for index, spec in enumerate(specs)}
    for output in request.outputs:
        if output.name not in places:
            raise InvalidArgument(
                f"unexpected inference output {quote(output.name)}: "
                f"model '{model.spec.name}' has {_names(list(places))}"
            )
        if output.classification < 0:
            raise InvalidArgument(f"classification of output '{output.name}' must be positive")
        if output.classification and specs[places[output.name]].datatype.size == 0:
            raise InvalidArgument(f"output '{output.name}' holds strings, which have no classification")
    return tuple((places[output.name], output.classification) for output in request.outputs)


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
