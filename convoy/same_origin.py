"""Tells requests of a server's own page from those that a page of another site sends through its reader's browser.

A browser sends the origin of a page with each request that may change something. A page that has given itself a name
for this machine's address (DNS rebinding) sends that name as Host, too.
"""

import ipaddress
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Returns whether a host, without a port, is this machine under a name that no other site can have."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a host name
        return host.lower() == "localhost"


def names_loopback(host: str) -> bool:
    """Returns whether the header Host, which may have a port, names this machine."""
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False


def is_own_page(origin: str | None, host: str) -> bool:
    """Returns whether a request comes from a page of the server itself, or from no page.

    Args:
        origin: the header Origin.
        host: the header Host.
    """
    return origin is None or origin.partition("://")[2] == host
