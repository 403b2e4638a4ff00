"""Checks of request parameters that gRPC and HTTP share."""

import time
from collections.abc import Mapping
from typing import Any

from serving.errors import InvalidArgument, Unsupported, quote
from serving.inference.request import RequestedOutput


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


def earliest_deadline(deadline: float | None, parameters: Mapping[str, Any]) -> float | None:
    """Returns the deadline, or the time at which the parameter `timeout` expires if that is sooner.

    Args:
        deadline: on the clock of `time.monotonic`; None for none.
        parameters: of a request. `timeout` counts microseconds from now; 0 means none.

    Raises:
        InvalidArgument: `timeout` is not a whole number, or is negative.
    """
    timeout = parameters.get("timeout")
    if timeout is None:
        return deadline
    if not isinstance(timeout, int) or isinstance(timeout, bool) or timeout < 0:
        raise InvalidArgument(f"parameter 'timeout' must be a whole number of microseconds, got {quote(timeout)}")
    if timeout == 0:
        return deadline
    expires = time.monotonic() + timeout * 1e-6
    return expires if deadline is None else min(deadline, expires)
