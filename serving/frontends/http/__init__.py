"""HTTP: the REST API on one port, `/metrics` and health on another."""

from serving.frontends.http.server import HttpAddress, HttpFrontend

__all__ = ["HttpAddress", "HttpFrontend"]
