"""Tells requests of a server's own page from those that a page of another site sends through its reader's browser.

A browser sends the origin of a page with each request that may change something. A page whose site has pointed a name
of its own at this machine (DNS rebinding) is of one origin with the server to the browser, and reads what it answers;
the browser sends that name as Host. So a server that trusts whoever can connect refuses such names.
"""

import ipaddress
from collections.abc import Collection, Iterable
from urllib.parse import urlsplit

LOCAL_DOMAINS = frozenset({"localhost", "local", "internal", "svc"})
"""Last parts of names that no site can register: RFC 6761, RFC 6762, ICANN's resolution of 2024-07-29, and Kubernetes'
name of a service within its cluster."""


def is_loopback(host: str) -> bool:
    """Returns whether a host, without a port, is this machine under a name that no other site can have."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a host name
        return host.lower() == "localhost"


def host_check(host: str, origins: Collection[str]) -> "HostCheck | None":
    """Returns the check of a server that asks for no tokens, in plain text; None where it protects nothing.

    Args:
        host: that the server listens on; on other hosts than loopback, attackers can connect without a browser.
        origins: of web pages that may call; `*` for all.
    """
    return HostCheck(origins) if is_loopback(host) and "*" not in origins else None


class HostCheck:
    """Refuses the names that another site can have, for a server that trusts whoever can connect.

    Addresses pass, and names without a dot, of `LOCAL_DOMAINS` and of the origins. So do requests without Host:
    browsers always send it.

    Args:
        origins: of web pages that may call, such as `https://shop.example`.
    """

    def __init__(self, origins: Iterable[str] = ()) -> None:
        self._allowed = frozenset(map(_host_name, (origin.partition("://")[2] for origin in origins)))

    def refuses(self, host: str | None) -> bool:
        """Returns whether the header Host, which may have a port, is a name that another site can have."""
        if not host:
            return False
        name = _host_name(host)
        if name is None:
            return True
        last = name.rpartition(".")[2]
        is_local = "." not in name or last in LOCAL_DOMAINS or last.isdecimal()
        return not is_local and name not in self._allowed


def _host_name(host: str) -> str | None:
    """Returns a host in lower case, without port and final dot; one word for any address of IPv6; None if malformed."""
    try:
        parts = urlsplit(f"//{host}")
        name = parts.hostname
    except ValueError:
        return None
    if not name or parts.netloc != host or "@" in host:
        return None
    return "ipv6" if ":" in name else name.removesuffix(".")


def is_own_page(origin: str | None, host: str) -> bool:
    """Returns whether a request comes from a page of the server itself, or from no page.

    Args:
        origin: the header Origin.
        host: the header Host.
    """
    return origin is None or origin in (f"http://{host}", f"https://{host}")
