"""Checks of request parameters that gRPC and HTTP share."""

from collections.abc import Mapping
from typing import Any

from serving.errors import InvalidArgument, Unsupported, quote
from serving.inference.request import RequestedOutput

_TRITON_PARAMETERS = frozenset({"triton_enable_empty_final_response", "triton_grpc_error"})
"""Reserved keys that Triton's clients send, and that change nothing for requests with one response each."""


def check_input_parameters(name: str, parameters: Mapping[str, Any]) -> None:
    """Checks the parameters of the input `name`.

    Raises:
        Unsupported: the input is in shared memory.
    """
    if "shared_memory_region" in parameters:
        raise Unsupported(f"input {quote(name)} is in shared memory, which this server does not read")


def requested_output(name: str, parameters: Mapping[str, Any]) -> RequestedOutput:
    """Returns the output that a client requests by `name` and `parameters`.

    Raises:
        InvalidArgument: `classification` is not a positive whole number.
        Unsupported: the client requests the output in shared memory.
    """
    if "shared_memory_region" in parameters:
        raise Unsupported(f"output {quote(name)} is requested in shared memory, which this server does not write")
    count = parameters.get("classification", 0)
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise InvalidArgument(
            f"classification of output {quote(name)} must be a positive whole number, got {quote(count)}"
        )
    return RequestedOutput(name, count)


def check_parameters(parameters: Mapping[str, Any]) -> None:
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


def timeout_of(parameters: Mapping[str, Any]) -> float | None:
    """Returns the seconds that a request may take by its parameter `timeout`, in microseconds; None for no limit.

    Raises:
        InvalidArgument: `timeout` is not a whole number, or is negative.
    """
    timeout = parameters.get("timeout", 0)
    if not isinstance(timeout, int) or isinstance(timeout, bool) or timeout < 0:
        raise InvalidArgument(f"parameter 'timeout' must be a whole number of microseconds, got {quote(timeout)}")
    return timeout * 1e-6 if timeout else None
