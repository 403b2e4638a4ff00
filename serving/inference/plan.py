"""The checked plan: how requests of one form run on one model version.

A plan is made from a request's names, data types and shapes, and checks them against the model. It holds none of the
request's data, and so serves all requests of the same form. Knows no protocol.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from serving.errors import InvalidArgument, Unsupported, quote
from serving.inference.classification import classify
from serving.inference.outputs import Outputs
from serving.inference.queue_policy import scheduling_of
from serving.inference.request import InferInput, InferOutput, InferRequest, InferResponse, RequestContext
from serving.models.loader import Model
from serving.protocol.tensors import Buffer, Elements, Shape, TensorSpec, num_elements, to_array, to_bytes

_TRITON_PARAMETERS = frozenset({"triton_enable_empty_final_response", "triton_grpc_error"})
"""Reserved keys that Triton's clients send, and that change nothing for requests with one response each."""


class Plan:
    """A request's form, checked against a model.

    Args:
        request: its data are ignored, except their number and order.

    Attributes:
        shapes: of the inputs, in the model's order.
        rows: size of the batch dimension; 1 for a model without one.
        requested: index of each requested output, and how many classes of it (0 for the tensor itself).
        places: in shared memory, of the requested outputs; None for a request without shared memory.
        timeout_s: how long a request may take; None for no limit.
        level: of priority, and `wait_us`: as in `QueuedRequest`.
        only_size: bytes of the only input; None if there are several, or it holds strings.
    """

    __slots__ = (
        "_order",
        "_sizes",
        "level",
        "model",
        "only_size",
        "places",
        "requested",
        "rows",
        "shapes",
        "timeout_s",
        "wait_us",
    )

    def __init__(self, model: Model, request: InferRequest) -> None:
        """Checks everything about a request except its data.

        Raises:
            InvalidArgument: the request does not fit the model.
        """
        specs = model.spec.inputs
        self.model = model
        self._order = _order_of_inputs(model, request.inputs)
        inputs = [request.inputs[place] for place in self._order]
        for spec, given in zip(specs, inputs, strict=True):
            _check_input(model, spec, given)
        self.shapes = tuple(given.shape for given in inputs)
        self.rows = _num_rows(model, self.shapes)
        self._sizes = [
            num_elements(given.shape) * spec.datatype.size for spec, given in zip(specs, inputs, strict=True)
        ]
        self.only_size = self._sizes[0] if len(specs) == 1 and specs[0].datatype.size else None
        self.requested = _requested_outputs(model, request)
        self.places = [output.place for output in request.outputs] if request.uses_shared_memory else None
        _check_parameters(request.parameters)
        scheduling = scheduling_of(request.parameters, model.spec.policies)
        self.level, self.wait_us, self.timeout_s = scheduling.level, scheduling.wait_us, scheduling.timeout_s

    def deadline(self, context: RequestContext) -> float | None:
        """Returns when the request must be answered, by its call's deadline and its own time-out."""
        if self.timeout_s is None:
            return context.deadline
        expires = time.monotonic() + self.timeout_s
        return expires if context.deadline is None else min(context.deadline, expires)

    def bind_inputs(self, data: Sequence[Buffer | Elements]) -> tuple[Buffer, ...]:
        """Returns the inputs' bytes in the model's order.

        Args:
            data: the inputs in the request's order.

        Raises:
            InvalidArgument: a tensor's number of bytes or elements does not match its shape, or an element does not
                fit its data type.
        """
        if len(data) == 1 == len(self._sizes) and type(data[0]) is memoryview and len(data[0]) == self.only_size:
            return (data[0],)  # the most frequent form, without the loop
        if len(data) != len(self._order):
            raise InvalidArgument(
                f"expected one entry of raw_input_contents for each of the {len(self._order)} inputs, got {len(data)}"
            )
        bound: list[Buffer] = []
        for spec, shape, size, place in zip(self.model.spec.inputs, self.shapes, self._sizes, self._order, strict=True):
            given = data[place]
            try:
                buffer = given.to_bytes(shape) if isinstance(given, Elements) else given
            except InvalidArgument as error:
                raise InvalidArgument(f"{_input(self.model, spec)}: {error}") from error
            bound.append(buffer)
            if spec.datatype.size == 0:
                to_array(spec.datatype, shape, buffer)  # checks the lengths of the strings
            elif len(buffer) != size:
                raise InvalidArgument(
                    f"{_input(self.model, spec)}: expected {size} bytes for {spec.datatype.name} of shape "
                    f"{list(shape)}, got {len(buffer)}"
                )
        return tuple(bound)

    def output_type(self, outputs: Outputs, index: int, top_k: int) -> tuple[str, Shape]:
        """Returns the data type and shape of this plan's part of an output."""
        row_shape = outputs.row_shapes[index]
        datatype = self.model.spec.outputs[index].datatype.name
        if top_k:
            datatype, row_shape = "BYTES", (min(top_k, num_elements(row_shape)),)
        return datatype, (self.rows, *row_shape) if self.model.spec.max_batch_size else row_shape

    def output_data(self, outputs: Outputs, index: int, top_k: int, first_row: int) -> bytes:
        """Returns the bytes of this plan's part of an output, or of its `top_k` classes."""
        if not top_k:
            return outputs.data(index, first_row, self.rows)
        rows = outputs.slice(index, first_row, self.rows).reshape(self.rows, -1)
        return to_bytes(classify(rows, top_k, self.model.labels.get(self.model.spec.outputs[index].name, [])))


class ValueEncoder:
    """Makes the responses of one plan as values."""

    __slots__ = ("plan",)

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def bind(self, request: InferRequest) -> tuple[Buffer, ...]:
        """Returns the inputs' bytes in the model's order. As `Plan.bind_inputs`."""
        return self.plan.bind_inputs(request.tensors)

    def encode(self, outputs: Outputs, first_row: int, request_id: str) -> InferResponse:
        """Returns the response for the plan's rows of a batch."""
        plan = self.plan
        if outputs.is_large:
            outputs.check_size([index for index, top_k in plan.requested if not top_k], plan.rows)
        tensors = []
        for index, top_k in plan.requested:
            datatype, shape = plan.output_type(outputs, index, top_k)
            data = plan.output_data(outputs, index, top_k, first_row)
            tensors.append(InferOutput(plan.model.spec.outputs[index].name, datatype, shape, data))
        return InferResponse(plan.model.spec.name, plan.model.version, request_id, tensors)


class SharedMemoryEncoder(ValueEncoder):
    """Makes the responses of a plan with outputs in shared memory."""

    __slots__ = ()

    def encode(self, outputs: Outputs, first_row: int, request_id: str) -> InferResponse:
        """Returns the response, without the outputs that it writes.

        Raises:
            InvalidArgument: an output does not fit into its place.
        """
        response = super().encode(outputs, first_row, request_id)
        for output, place in zip(response.outputs, self.plan.places or (), strict=False):
            if place is not None:
                place.write(output.name, output.data)
                output.data, output.is_shared = b"", True
        return response


def _input(model: Model, spec: TensorSpec) -> str:
    return f"input '{spec.name}' of model '{model.spec.name}'"


def _order_of_inputs(model: Model, inputs: Sequence[InferInput]) -> tuple[int, ...]:
    """Returns the place in the request of each of the model's inputs."""
    places = {given.name: place for place, given in enumerate(inputs)}
    expected = [spec.name for spec in model.spec.inputs]
    for name in places.keys() - set(expected):
        raise InvalidArgument(f"model '{model.spec.name}' has no input {quote(name)}: it expects {_names(expected)}")
    if len(places) != len(inputs):
        raise InvalidArgument(f"an input is given twice: expected each of {_names(expected)} once")
    if missing := [name for name in expected if name not in places]:
        raise InvalidArgument(
            f"model '{model.spec.name}' expected {len(expected)} inputs, got {len(inputs)}: "
            f"{_names(missing)} is missing"
        )
    return tuple(places[name] for name in expected)


def _check_input(model: Model, spec: TensorSpec, given: InferInput) -> None:
    if given.datatype != spec.datatype.name:
        raise InvalidArgument(
            f"{_input(model, spec)}: data-type is {quote(given.datatype)}, but the model expects '{spec.datatype.name}'"
        )
    if not spec.accepts(given.shape) or min(given.shape, default=0) < 0:
        raise InvalidArgument(
            f"{_input(model, spec)}: unexpected shape, expected {list(spec.shape)}, got {quote(list(given.shape))}"
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


def _requested_outputs(model: Model, request: InferRequest) -> tuple[tuple[int, int], ...]:
    specs = model.spec.outputs
    if not request.outputs:
        return tuple((index, 0) for index in range(len(specs)))
    indices = {spec.name: index for index, spec in enumerate(specs)}
    names = {output.name for output in request.outputs}
    if len(names) != len(request.outputs):
        raise InvalidArgument(f"an output is requested twice: expected each of {_names(sorted(indices))} once at most")
    for output in request.outputs:
        if output.name not in indices:
            raise InvalidArgument(
                f"unexpected inference output {quote(output.name)}: "
                f"model '{model.spec.name}' has {_names(list(indices))}"
            )
        if output.classification and specs[indices[output.name]].datatype.size == 0:
            raise InvalidArgument(f"output '{output.name}' holds strings, which have no classification")
    return tuple((indices[output.name], output.classification) for output in request.outputs)


def _check_parameters(parameters: Mapping[str, Any]) -> None:
    """Checks that a request's parameters ask for nothing that this server would ignore in silence.

    https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_parameters.md

    Raises:
        InvalidArgument: a key is reserved.
        Unsupported: the request belongs to a sequence.
    """
    for key, value in parameters.items():
        if key == "headers" or (key.startswith("triton_") and key not in _TRITON_PARAMETERS):
            raise InvalidArgument(f"parameter {quote(key)} is reserved: choose another name")
        if key == "sequence_id" and value:
            raise Unsupported("parameter 'sequence_id': the server does not keep the requests of a sequence together")


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
