"""Pings on gRPC connections that are silent, so that a peer whose host froze or vanished is noticed."""


def keepalive_options(*, every_s: int, timeout_s: int) -> tuple[tuple[str, int], ...]:
    """Returns the options of a gRPC channel or server.

    Args:
        every_s: seconds without traffic after which it pings.
        timeout_s: seconds that the peer has to respond.
    """
    return (
        ("grpc.keepalive_time_ms", 1000 * every_s),
        ("grpc.keepalive_timeout_ms", 1000 * timeout_s),
        ("grpc.http2.ping_timeout_ms", 1000 * timeout_s),  # gRPC has a minute here, whatever the one above is
    )
