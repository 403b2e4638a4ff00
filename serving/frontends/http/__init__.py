"""HTTP: the REST API on one port, metrics and health on another.

`frontend` has both servers, `server` runs one. `protocol` is one connection, which writes through `transport`, and
`connections` all of a port, with their limits. A request goes through `body_memory`, `middleware` and `auth`, which
wrap the routes of `app`, to its endpoint; inferences that repeat take the `fast_path`.

The endpoints are `infer`, `classify` (its files are `uploads`), `openapi`, those of the page (`page`, `live`,
`page_models`, `saved_images`) and, for all others, `admin`. They read with `body`, write with `responses`, leave to
`executor` what would hold up the loop, and await inferences over the `loop_bridge`; `counting` counts the answers of
all but inferences.
"""

from serving.frontends.http.frontend import HttpFrontend
from serving.frontends.http.settings import HttpSettings, PageSettings

__all__ = ["HttpFrontend", "HttpSettings", "PageSettings"]
