"""The one table from errors to status codes: gRPC's (https://grpc.io/docs/guides/status-codes) and HTTP's.

Codes are Triton's where Triton has the case; a passed deadline and a full queue have gRPC's own names for them.
"""

from serving.errors import (
    Cancelled,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    ServingError,
    Unauthenticated,
    Unavailable,
    Unsupported,
)

OK = 0

_CODES: dict[type[ServingError], tuple[int, int]] = {
    Cancelled: (1, 499),
    InvalidArgument: (3, 400),
    DeadlineExceeded: (4, 504),
    NotFound: (5, 404),
    ResourceExhausted: (8, 429),
    Unsupported: (12, 501),
    Internal: (13, 500),
    Unavailable: (14, 503),
    Unauthenticated: (16, 401),
}

NAMES = {
    OK: "OK",
    1: "CANCELLED",
    3: "INVALID_ARGUMENT",
    4: "DEADLINE_EXCEEDED",
    5: "NOT_FOUND",
    8: "RESOURCE_EXHAUSTED",
    12: "UNIMPLEMENTED",
    13: "INTERNAL",
    14: "UNAVAILABLE",
    16: "UNAUTHENTICATED",
}
"""Names of the gRPC codes that we answer with, for logs and metrics."""


def grpc_code(error: ServingError) -> int:
    """The number of the gRPC status code."""
    return _CODES[type(error)][0]


def http_status(error: ServingError) -> int:
    return _CODES[type(error)][1]


def trailing_metadata(error: ServingError) -> tuple[tuple[str, str], ...]:
    """What a gRPC client reads after the status: when to try again (gRFC A6, "Pushback")."""
    if isinstance(error, ResourceExhausted) and error.retry_after_ms is not None:
        return (("grpc-retry-pushback-ms", str(error.retry_after_ms)),)
    return ()
