"""Limits of the gRPC front ends."""

from serving.errors import ResourceExhausted

MAX_STREAMS = 256
"""Open ModelStreamInfer, Watch and reflection calls of one server."""

KEEPALIVE_S = 60
"""Seconds without traffic after which the server pings a connection, so that it notices clients that vanished."""
KEEPALIVE_TIMEOUT_S = 20
"""Seconds that a client has to respond to a ping."""


def too_many_streams(limit: int) -> ResourceExhausted:
    """Returns the error for a stream beyond the limit."""
    return ResourceExhausted(f"this server serves at most {limit} streams at a time")
