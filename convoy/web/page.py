"""Routes of the page: `/`, its modules and styles under `/web/`, and `/web/page.json`, which lists its sections.

The files are plain HTML, CSS and JavaScript, read once. Whichever server shows the page adds the routes to its own, and
answers the section's requests for data itself.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from convoy.version import convoy_version

STATIC = Path(__file__).parent / "static"

INDEX = "index.html"
PAGE_JSON = "/web/page.json"

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}
"""Types of the files that are served, by suffix. Browsers refuse a module of another type."""

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "object-src 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""No script, style or request but those of the server itself, and no text that becomes HTML."""

_HEADERS = {
    "cache-control": "no-cache",  # a browser asks each time, and gets 304 until the server is another version
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def page_routes(
    sections: Sequence[str], *, title: str, options: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Route]:
    """Returns the routes of the page. None of them needs a token: they hold nothing of a user's.

    Args:
        sections: names of the modules that the page shows, in the order of its navigation.
        title: of the page.
        options: for a section, what its module gets as `page.options`.
    """
    settings = {
        "title": title,
        "version": convoy_version(),
        "sections": list(sections),
        "options": {name: dict(values) for name, values in (options or {}).items()},
    }
    files = {path.name: path.read_bytes() for path in sorted(STATIC.iterdir()) if path.suffix in _TYPES}
    pages = {name: _Page(content, _TYPES[Path(name).suffix]) for name, content in files.items()}
    described = _Page(json.dumps(settings).encode(), _TYPES[".json"])

    async def page(request: Request) -> Response:
        return pages[INDEX].answer(request)

    async def page_settings(request: Request) -> Response:
        return described.answer(request)

    async def page_file(request: Request) -> Response:
        found = pages.get(request.path_params["file"])
        if found is None:
            raise HTTPException(404)
        return found.answer(request)

    return [Route("/", page), Route(PAGE_JSON, page_settings), Route("/web/{file}", page_file)]


def is_page(path: str) -> bool:
    """Returns whether a path is one of the page's routes, which need no token."""
    return path == "/" or (path.startswith("/web/") and "/" not in path.removeprefix("/web/"))


class _Page:
    """One file, with the headers of its response."""

    def __init__(self, content: bytes, content_type: str) -> None:
        self._content = content
        self._headers = _HEADERS | {
            "content-type": content_type,
            "etag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
        }

    def answer(self, request: Request) -> Response:
        """Returns the file; without content if the browser has it."""
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if self._headers["etag"] in known:
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, headers=self._headers)
