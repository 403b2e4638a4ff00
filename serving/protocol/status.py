"""The table of status codes: gRPC's (https://grpc.io/docs/guides/status-codes) and HTTP's for each error.

The codes are Triton's wherever Triton has the case; an expired deadline and a full queue have the codes that gRPC
defines for them.
"""

from serving.errors import (
    Cancelled,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    ServingError,
    Unauthenticated,
    Unavailable,
    Unsupported,
)

OK = 0

_STATUSES: dict[type[ServingError], tuple[int, str, int]] = {
    Cancelled: (1, "CANCELLED", 499),
    InvalidArgument: (3, "INVALID_ARGUMENT", 400),
    DeadlineExceeded: (4, "DEADLINE_EXCEEDED", 504),
    NotFound: (5, "NOT_FOUND", 404),
    PermissionDenied: (7, "PERMISSION_DENIED", 403),
    ResourceExhausted: (8, "RESOURCE_EXHAUSTED", 429),
    Unsupported: (12, "UNIMPLEMENTED", 501),
    Internal: (13, "INTERNAL", 500),
    Unavailable: (14, "UNAVAILABLE", 503),
    Unauthenticated: (16, "UNAUTHENTICATED", 401),
}
"""gRPC's code, its name, and HTTP's code."""

STATUS_NAMES = {OK: "OK"} | {code: name for code, name, _ in _STATUSES.values()}
"""Names of the gRPC codes that the server sends, for logs and metrics."""


def grpc_code(error: ServingError) -> int:
    """Returns the gRPC status code of an error."""
    return _STATUSES[type(error)][0]


def status_name(error: ServingError) -> str:
    """Returns the name of the gRPC status code of an error."""
    return _STATUSES[type(error)][1]


def http_status(error: ServingError) -> int:
    """Returns the HTTP status code of an error."""
    return _STATUSES[type(error)][2]


def trailing_metadata(error: ServingError) -> tuple[tuple[str, str], ...]:
    """Returns the trailing metadata of an error: the retry hint, where there is one.

    https://github.com/grpc/proposal/blob/master/A6-client-retries.md#pushback
    """
    if isinstance(error, ResourceExhausted) and error.retry_after_ms is not None:
        return (("grpc-retry-pushback-ms", str(error.retry_after_ms)),)
    return ()
