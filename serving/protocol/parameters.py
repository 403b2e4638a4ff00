"""Checks of request parameters that gRPC and HTTP share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serving.errors import InvalidArgument, Unsupported, quote
from serving.inference.queue_policy import QueuePolicies
from serving.inference.request import RequestedOutput, SharedRange

_TRITON_PARAMETERS = frozenset({"triton_enable_empty_final_response", "triton_grpc_error"})
"""Reserved keys that Triton's clients send, and that change nothing for requests with one response each."""


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


@dataclass(frozen=True, slots=True)
class Scheduling:
    """What a request's parameters, and its model's configuration, say of its time in the queue.

    Args:
        level: of priority, as in `QueuePolicies`.
        wait_us: how long it may wait, by the policy of its level; 0 for no limit.
        timeout_s: in which it must be answered; None for no limit.
    """

    level: int = 0
    wait_us: int = 0
    timeout_s: float | None = None


def scheduling_of(parameters: Mapping[str, Any], policies: QueuePolicies | None) -> Scheduling:
    """Returns what the parameters `priority` and `timeout` (in microseconds) mean for a model.

    https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_schedule_policy.md

    Raises:
        InvalidArgument: one is not a whole number, or is negative.
    """
    timeout = _whole_number(parameters, "timeout", " of microseconds")
    timeout_s = timeout * 1e-6 if timeout else None
    if policies is None:
        return Scheduling(timeout_s=timeout_s)
    level = policies.level(_whole_number(parameters, "priority"))
    policy = policies.levels[level]
    return Scheduling(level, policy.wait_us(timeout), None if policy.interprets_timeout else timeout_s)


def _whole_number(parameters: Mapping[str, Any], name: str, unit: str = "") -> int:
    value = parameters.get(name, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidArgument(f"parameter '{name}' must be a whole number{unit}, got {quote(value)}")
    return value
