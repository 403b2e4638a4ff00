"""HTTP: the REST API on one port, metrics and health on another.

`frontend` has both servers, `server` runs one, `protocol` is one connection and `connections` all of a port, with their
limits. `app` has the routes, `middleware` and `auth` wrap all requests, `infer` is the infer endpoint, `admin` all
others but the page's, which are `page`, `live`, `described` and `saved_images`. `body` reads request bodies,
`responses` writes JSON and errors, `executor` runs what would hold up the loop.
"""

from serving.frontends.http.address import HttpAddress, PageSettings
from serving.frontends.http.frontend import HttpFrontend

__all__ = ["HttpAddress", "HttpFrontend", "PageSettings"]
