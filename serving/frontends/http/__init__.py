"""HTTP: the REST API on one port, metrics and health on another.

`frontend` is the server, `app` its routes, `infer` the infer endpoint, `admin` all other endpoints, `body` reads
request bodies, `middleware` wraps all requests, `protocol` bounds their heads, `responses` writes JSON and errors.
"""

from serving.frontends.http.frontend import HttpAddress, HttpFrontend

__all__ = ["HttpAddress", "HttpFrontend"]
