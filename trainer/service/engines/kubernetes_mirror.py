"""A copy in memory of the objects of one kind that carry a label, which a thread keeps up to date by a watch.

The thread lists once, then watches from the version of that list. Where the server has forgotten that version (410), it
lists again; where the connection is lost or the server refuses, it goes on from the last version after a growing pause.
From the second failure on the copy answers nothing, so that no caller takes an old state for a new one.
"""

import json
import threading
import time
from collections import OrderedDict
from typing import Any

import urllib3

from trainer.errors import TrainerError
from trainer.service.engines.engine import EngineUnavailableError
from trainer.service.engines.kubernetes_client import Api, ExpiredError, Object

FIRST_LIST_S = 5.0
"""Longest wait of a caller for the first list."""
WATCH_S = 60
"""The server ends a watch after this time."""
_SILENCE_S = WATCH_S + 15.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_PAGE = 500
_MAX_DELETED = 1000


class Mirror:
    """The objects.

    Args:
        path: of their collection.
        selector: of labels.
    """

    def __init__(self, api: Api, path: str, selector: str) -> None:
        self._api = api
        self._path = path
        self._selector = selector
        self._lock = threading.Lock()
        self._objects: dict[str, Object] = {}
        self._deleted: OrderedDict[str, Object] = OrderedDict()
        self._version = ""
        self._error: TrainerError | None = None
        self._is_known = threading.Event()
        """Set when the first list has succeeded or failed."""
        self._over = threading.Event()
        self._response: urllib3.BaseHTTPResponse | None = None
        self._thread = threading.Thread(target=self._run, name="kubernetes-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._over.set()
        with self._lock:
            if self._response is not None:
                self._response.shutdown()
        self._thread.join()

    def get(self, uid: str) -> Object | None:
        """Returns an object; None if this copy does not have it, or not yet.

        Raises:
            TrainerError: the copy is not up to date.
        """
        self._check()
        with self._lock:
            return self._objects.get(uid)

    def find(self, label: str, value: str) -> list[Object]:
        """Returns the objects with a label. Raises as `get` does."""
        self._check()
        with self._lock:
            return [item for item in self._objects.values() if _has(item, label, value)]

    def deleted(self, label: str, value: str) -> list[Object]:
        """Returns the last states of deleted objects with a label, oldest first, as far as this copy has seen them."""
        with self._lock:
            return [item for item in self._deleted.values() if _has(item, label, value)]

    def _check(self) -> None:
        if not self._is_known.wait(FIRST_LIST_S):
            raise EngineUnavailableError(f"the API server does not answer to GET {self._path}")
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._over.is_set():
            began = time.monotonic()
            try:
                if not self._version:
                    self._list()
                self._watch()
                pause_s = _FIRST_PAUSE_S
            except ExpiredError:
                self._version = ""
                self._over.wait(_FIRST_PAUSE_S / 10)
            except Exception as error:
                if time.monotonic() - began > _LONGEST_PAUSE_S:  # it has worked until now: a proxy may cut it each time
                    pause_s = _FIRST_PAUSE_S
                if pause_s > _FIRST_PAUSE_S or not self._is_known.is_set():  # a lost connection alone is no news
                    self._error = error if isinstance(error, TrainerError) else EngineUnavailableError(repr(error))
                    self._is_known.set()
                self._over.wait(pause_s)
                pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)

    def _list(self) -> None:
        objects: dict[str, Object] = {}
        query = {"labelSelector": self._selector, "limit": str(_PAGE)}
        while True:
            page = self._api.call("GET", self._path, query=query)
            objects |= {str(item["metadata"]["uid"]): item for item in page["items"]}
            query["continue"] = str(page["metadata"].get("continue") or "")
            if not query["continue"]:
                break
        with self._lock:
            for uid in self._objects.keys() - objects.keys():
                self._remember(self._objects[uid])
            self._objects = objects
        self._version = str(page["metadata"]["resourceVersion"])
        self._know()

    def _watch(self) -> None:
        query = {
            "watch": "true",
            "labelSelector": self._selector,
            "resourceVersion": self._version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(WATCH_S),
        }
        with self._api.open("GET", self._path, query=query, timeout_s=(3.0, _SILENCE_S)) as response:
            self._know()
            with self._lock:
                if self._over.is_set():
                    return
                self._response = response
            try:
                for line in _lines(response):
                    self._apply(json.loads(line))
            except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
                raise EngineUnavailableError(f"the watch of {self._path} broke off: {error}") from error
            finally:
                with self._lock:
                    self._response = None

    def _know(self) -> None:
        self._error = None
        self._is_known.set()

    def _apply(self, event: dict[str, Any]) -> None:
        item = event["object"]
        if event["type"] == "ERROR":
            if item.get("code") == 410:
                raise ExpiredError(str(item.get("message")))
            raise EngineUnavailableError(f"the watch of {self._path} failed: {item.get('message')}")
        uid = str(item["metadata"].get("uid"))
        with self._lock:
            if event["type"] == "DELETED":
                self._objects.pop(uid, None)
                self._remember(item)
            elif event["type"] != "BOOKMARK":
                self._objects[uid] = item
        self._version = str(item["metadata"]["resourceVersion"])

    def _remember(self, item: Object) -> None:
        self._deleted[str(item["metadata"]["uid"])] = item
        while len(self._deleted) > _MAX_DELETED:
            self._deleted.popitem(last=False)


def _lines(response: urllib3.BaseHTTPResponse) -> Any:
    """Yields the lines of an answer as soon as they are complete."""
    rest = b""
    for chunk in response.stream(amt=None, decode_content=True):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line for line in lines if line.strip())


def _has(item: Object, label: str, value: str) -> bool:
    return bool(item["metadata"].get("labels", {}).get(label) == value)
