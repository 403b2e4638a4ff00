"""What gRPC's core is told: pings, limits, and what it must not log. For the channels and servers of all packages."""

import logging

_MAX_METADATA_BYTES = 16 << 10
METADATA_OPTIONS = (
    ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", _MAX_METADATA_BYTES),
)
"""Options of a server. By default the core refuses a share of the calls with over 8 KiB of metadata at random, as of
callers with long cookies."""
_MAX_DETAIL_BYTES = 2000
_OF_CLIENTS = ("Invalid encoding", "ExecuteBatchError raised")
"""How the core begins what it logs, with a stack, of metadata that are no text, and of a client that has left."""


def keepalive_options(*, every_s: int, timeout_s: int) -> tuple[tuple[str, int], ...]:
    """Returns the options of a channel or server that notices a peer whose host froze or vanished.

    Args:
        every_s: seconds without traffic after which it pings.
        timeout_s: seconds that the peer has to respond.
    """
    return (
        ("grpc.keepalive_time_ms", 1000 * every_s),
        ("grpc.keepalive_timeout_ms", 1000 * timeout_s),
        ("grpc.http2.ping_timeout_ms", 1000 * timeout_s),  # gRPC has a minute here, whatever the one above is
    )


def as_details(text: str) -> str:
    """Returns an error's text, cut: it travels in a header, percent-encoded, and clients accept 8 KiB by default."""
    return text.encode("utf-8", "replace")[:_MAX_DETAIL_BYTES].decode("utf-8", "ignore")


def ignore_clients_faults() -> None:
    """Keeps the core from logging stacks for what clients do: anybody could fill the disk."""
    logging.getLogger("grpc._cython.cygrpc").addFilter(lambda record: not str(record.msg).startswith(_OF_CLIENTS))
