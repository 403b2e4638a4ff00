"""HTTP: the REST API on one port, `/metrics` and health on another."""

from serving.http.server import HttpAddress, HttpServer

__all__ = ["HttpAddress", "HttpServer"]
