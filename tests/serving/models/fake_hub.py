"""A small server of the Hugging Face Hub's HTTP API: one repository of models, whose files lie in a folder.

Answers what HfFileSystem asks for to list, to read and to commit files (https://huggingface.co/docs/hub/api).
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

REPOSITORY = "user/classifiers"
TOKEN = "hf_secret"


class FakeHub(ThreadingHTTPServer):
    """The server.

    Args:
        folder: with the files of `REPOSITORY`, which is private.

    Attributes:
        url: of the server, for HF_ENDPOINT.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"

    def tree(self, path: str) -> list[dict[str, Any]]:
        """Returns all files and folders below a path."""
        return [
            {"type": "directory", "path": str(found.relative_to(self.folder)), "size": 0, "oid": "0" * 40}
            if found.is_dir()
            else {
                "type": "file",
                "path": str(found.relative_to(self.folder)),
                "size": found.stat().st_size,
                "oid": hashlib.sha1(found.read_bytes(), usedforsecurity=False).hexdigest(),
            }
            for found in sorted((self.folder / path).rglob("*"))
        ]

    def commit(self, lines: list[bytes]) -> None:
        """Writes the files of a commit."""
        for operation in map(json.loads, lines):
            if operation["key"] == "file":
                file = self.folder / operation["value"]["path"]
                file.write_bytes(base64.b64decode(operation["value"]["content"]))


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api, _, rest = path.partition(f"/{REPOSITORY}")
        kind, _, inside = rest.lstrip("/").partition("/")
        _, _, file = inside.partition("/")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif rest == path or api not in ("", "/api/models") or inside.startswith("lost"):
            self._answer(404, {"error": "Repository not found"})
        elif kind == "tree":
            self._answer(200, self.server.tree(file))
        elif kind == "resolve":
            self._answer(200, (self.server.folder / file).read_bytes())
        else:
            self._answer(200, {"_id": "1", "id": REPOSITORY, "sha": "1" * 40, "private": True, "siblings": []})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
            self._answer(200, {"files": modes})
        else:
            self.server.commit(body.splitlines())
            self._answer(200, {"commitUrl": f"{self.server.url}/{REPOSITORY}/commit/1", "commitOid": "1" * 40})

    def _answer(self, status: int, content: object) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status in (401, 404):
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def fake_hub(folder: Path) -> Iterator[FakeHub]:
    """Yields a hub that serves the files of a folder."""
    with FakeHub(folder) as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
