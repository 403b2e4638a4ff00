"""Parameters of inputs and outputs, which gRPC and HTTP share. Those of requests are for `serving.inference.plan`."""

from collections.abc import Mapping
from typing import Any

from serving.errors import InvalidArgument, quote
from serving.inference.request import RequestedOutput, SharedRange


def shared_range(parameters: Mapping[str, Any]) -> SharedRange | None:
    """Returns where a tensor is in shared memory, not checked yet; None for one that is not."""
    if "shared_memory_region" not in parameters:
        return None
    offset, num_bytes = (parameters.get(f"shared_memory_{name}", 0) for name in ("offset", "byte_size"))
    return SharedRange(parameters["shared_memory_region"], offset, num_bytes)


def requested_output(name: str, parameters: Mapping[str, Any]) -> RequestedOutput:
    """Returns the output that a client requests by `name` and `parameters`.

    Raises:
        InvalidArgument: `classification` is not a positive whole number.
    """
    count = parameters.get("classification", 0)
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise InvalidArgument(
            f"classification of output {quote(name)} must be a positive whole number, got {quote(count)}"
        )
    return RequestedOutput(name, count, shared_range(parameters))
