"""HTTP: the REST API on one port and `/metrics` on another."""

from serving.http.server import HttpAddress, HttpServer

__all__ = ["HttpAddress", "HttpServer"]
