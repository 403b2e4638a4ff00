"""A small API server of Kubernetes: the REST calls that the engine uses, with faults when a test wants them.

It stores what it is sent, checks it by the strict schemas, and has watches, bookmarks, foreground deletion and tokens.
It permits what the Role of `deploy/base/jobs` permits, so that every test of the engine shows that the Role suffices.
It runs no controllers: a test plays the Job's, the scheduler's and the kubelet's parts by calling `add_pod`, `change`
and `end_pod`.
"""

import json
import threading
import time
import uuid
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import yaml

from tests.deploy.manifests import DEPLOY
from tests.deploy.schema import schema_problems

Object = dict[str, Any]
RIGHTS = {
    (group, resource, verb)
    for rule in yaml.safe_load((DEPLOY / "base/jobs/role.yaml").read_text())["rules"]
    for group in rule["apiGroups"]
    for resource in rule["resources"]
    for verb in rule["verbs"]
}
GROUPS = {"trainjob": "trainer.kubeflow.org/v1alpha1", "jobset": "jobset.x-k8s.io/v1alpha2", "job": "batch/v1"}


@dataclass
class Fault:
    """What happens instead of, or after, the next matching request.

    Args:
        method: of the request; a watch is WATCH.
        part: of its path.
        status: of the answer; 0 drops the connection.
        is_done: whether the request has its effect before the answer is lost.
        number: of the request, counted from 1, in place of method and path.
    """

    method: str
    part: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    is_done: bool = False
    number: int = 0

    def matches(self, method: str, path: str, number: int) -> bool:
        """Returns whether it is this request's."""
        return number == self.number if self.number else self.method == method and self.part in path


class KubernetesApi:
    """The server and its objects."""

    def __init__(self, *kinds: str) -> None:
        self.kinds = kinds or ("job",)
        self.tokens = {"good"}
        self.forbidden: set[tuple[str, str]] = set()
        """Pairs of a verb and a resource, of those that the Role permits."""
        self.namespaces = {"training"}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.logs: dict[str, list[tuple[str, str]]] = {}
        """Times and lines, by the name of the pod."""
        self.oldest = 0
        """Watches from before this version get 410."""
        self._objects: dict[tuple[str, str], Object] = {}
        self._history: list[tuple[int, str, str, Object]] = []
        self._version = 100
        self._changed = threading.Condition()
        self._is_over = False
        handler = type("Handler", (_Handler,), {"api": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = False
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def all(self, resource: str) -> list[Object]:
        """Returns copies of all objects of a resource, such as `jobs`."""
        with self._changed:
            return [
                deepcopy(item) for (path, _), item in sorted(self._objects.items()) if path.endswith("/" + resource)
            ]

    def change(self, resource: str, name: str, change: Callable[[Object], None]) -> None:
        """Changes an object, as a controller does."""
        with self._changed:
            path = next(path for path, known in self._objects if known == name and path.endswith("/" + resource))
            change(self._objects[path, name])
            self._record("MODIFIED", path, self._objects[path, name])

    def add_pod(self, owner: Object, index: int = 0, **status: Any) -> str:
        """Adds the pod of a Job's host; returns its name."""
        template = owner["spec"]["template"]
        name = f"{owner['metadata']['name']}-{index}-{uuid.uuid4().hex[:5]}"
        labels = template["metadata"]["labels"] | {"batch.kubernetes.io/job-name": owner["metadata"]["name"]}
        annotations = {"batch.kubernetes.io/job-completion-index": str(index)}
        pod = {"metadata": {"name": name, "namespace": "training", "labels": labels, "annotations": annotations}}
        pod |= {"spec": template["spec"], "status": {"phase": "Pending", **status}}
        self.add("/api/v1/namespaces/training/pods", pod)
        return name

    def set_pod(self, name: str, phase: str, **status: Any) -> None:
        """Sets the status of a pod."""
        self.change("pods", name, lambda pod: pod.update(status={"phase": phase, **status}))

    def end_pod(self, name: str, code: int, reason: str = "Error") -> None:
        """Ends a pod's container; a pod that is being deleted is then gone, and its owner after the last one."""
        ended = {"exitCode": code, "reason": reason, "finishedAt": f"2026-01-01T00:00:{len(self._history):02d}Z"}
        self.set_pod(
            name,
            "Failed" if code else "Succeeded",
            containerStatuses=[{"name": "trainer", "state": {"terminated": ended}}],
        )
        with self._changed:
            path = "/api/v1/namespaces/training/pods"
            if "deletionTimestamp" in self._objects[path, name]["metadata"]:
                self._remove(path, name)
            for owner, key in list(self._objects):
                is_ending = "deletionTimestamp" in self._objects[owner, key]["metadata"]
                if owner != path and is_ending and not self._pods_of(self._objects[owner, key]):
                    self._remove(owner, key)

    def finish(self, resource: str, name: str, kind: str, message: str = "") -> None:
        """Sets a condition, such as Complete, Failed or Suspended."""
        condition = {"type": kind, "status": "True", "reason": "Test", "message": message}
        self.change(resource, name, lambda item: item.setdefault("status", {}).update(conditions=[condition]))

    def add(self, path: str, item: Object) -> Object:
        """Stores a new object."""
        with self._changed:
            item["metadata"] |= {"uid": str(uuid.uuid4()), "namespace": path.split("/namespaces/")[1].split("/")[0]}
            self._objects[path, item["metadata"]["name"]] = item
            self._record("ADDED", path, item)
            return deepcopy(item)

    def remove(self, resource: str, name: str) -> None:
        """Deletes an object at once."""
        with self._changed:
            path = next(path for path, known in self._objects if known == name and path.endswith("/" + resource))
            self._remove(path, name)

    def forget_history(self) -> None:
        """Makes every watch from a known version too old, and ends those that run."""
        with self._changed:
            self._version += 1
            self.oldest = self._version
            self._changed.notify_all()

    def get(self, path: str, name: str) -> Object | None:
        with self._changed:
            return deepcopy(self._objects.get((path, name)))

    def select(self, path: str, selector: dict[str, str]) -> tuple[int, list[Object]]:
        with self._changed:
            found = [item for (known, _), item in self._objects.items() if known == path and _matches(item, selector)]
            return self._version, deepcopy(found)

    def delete(self, path: str, name: str, options: Object) -> int:
        with self._changed:
            item = self._objects.get((path, name))
            if item is None:
                return 404
            if options.get("preconditions", {}).get("uid", item["metadata"]["uid"]) != item["metadata"]["uid"]:
                return 409
            pods = self._pods_of(item)
            if path.endswith("/pods"):
                pods = [name]
            if pods:
                self._mark(path, name, options)
                for pod in pods:
                    self._mark("/api/v1/namespaces/training/pods", pod, options)
            else:
                self._remove(path, name)
            return 200

    def watch(self, path: str, selector: dict[str, str], after: int, send: Callable[[Object], None]) -> None:
        """Sends events until the server ends or forgets."""
        sent = after
        while True:
            with self._changed:
                if sent < self.oldest:
                    send({"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old"}})
                    return
                new = [entry for entry in self._history if entry[0] > sent]
                if not new:
                    if self._is_over or not self._changed.wait(0.5):
                        send({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(sent)}}})
                    if self._is_over:
                        return
                    continue
            for version, kind, where, item in new:
                sent = version
                if where == path and _matches(item, selector):
                    send({"type": kind, "object": item})

    def _mark(self, path: str, name: str, options: Object) -> None:
        metadata = self._objects[path, name]["metadata"]
        metadata.setdefault("deletionTimestamp", "2026-01-01T00:00:00Z")
        if path.endswith("/pods"):
            metadata["deletionGracePeriodSeconds"] = options.get("gracePeriodSeconds", 60)
        self._record("MODIFIED", path, self._objects[path, name])

    def _pods_of(self, item: Object) -> list[str]:
        mine = item["metadata"].get("labels", {}).get("convoy-job")
        pods = [(name, pod) for (path, name), pod in self._objects.items() if path.endswith("/pods")]
        return [name for name, pod in pods if mine and pod["metadata"]["labels"].get("convoy-job") == mine]

    def _remove(self, path: str, name: str) -> None:
        self._record("DELETED", path, self._objects.pop((path, name)))

    def _record(self, kind: str, path: str, item: Object) -> None:
        self._version += 1
        item["metadata"]["resourceVersion"] = str(self._version)
        self._history.append((self._version, kind, path, deepcopy(item)))
        self._changed.notify_all()


def _matches(item: Object, selector: dict[str, str]) -> bool:
    labels = item["metadata"].get("labels", {})
    return all(labels.get(name) == value for name, value in selector.items())


class _Handler(BaseHTTPRequestHandler):
    api: KubernetesApi
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        self._handle("GET")

    def do_POST(self) -> None:
        self._handle("POST")

    def do_PATCH(self) -> None:
        self._handle("PATCH")

    def do_DELETE(self) -> None:
        self._handle("DELETE")

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self, method: str) -> None:
        self.close_connection = True
        address = urlsplit(self.path)
        query, path = dict(parse_qsl(address.query)), address.path
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        verb = "WATCH" if "watch" in query else method
        self.api.requests.append(f"{verb} {path}")
        number = len(self.api.requests)
        fault = next((one for one in self.api.faults if one.matches(verb, path, number)), None)
        if fault is not None:
            self.api.faults.remove(fault)
            if fault.is_done:
                self._answer(method, path, query, body)
            if fault.status:
                self._refuse(fault.status, "injected", fault.headers)
            return
        if self.headers.get("Authorization", "").removeprefix("Bearer ") not in self.api.tokens:
            self._refuse(401, "Unauthorized")
        elif path != "/apis" and (refusal := self._refusal(verb, path)):
            self._refuse(403, refusal)
        elif verb == "WATCH":
            self._watch(path, query)
        else:
            status, content = self._answer(method, path, query, body)
            if status >= 300:
                self._refuse(status, str(content))
            else:
                self._send(status, content if isinstance(content, bytes) else json.dumps(content).encode())

    def _answer(self, method: str, path: str, query: dict[str, str], body: Object) -> tuple[int, Any]:
        if path == "/apis":
            versions = [{"groupVersion": GROUPS[kind]} for kind in {"job", *self.api.kinds}]
            return 200, {"groups": [{"name": "x", "versions": versions}]}
        parts = path.split("/namespaces/")[1].split("/")
        collection = path.split("/namespaces/")[0] + f"/namespaces/{parts[0]}/{parts[1]}"
        if parts[0] not in self.api.namespaces:
            return 404, f'namespaces "{parts[0]}" not found'
        if parts[2:]:
            return self._one(method, collection, parts[2:], query, body)
        selector = dict(part.split("=") for part in query.get("labelSelector", "").split(",") if part)
        if method == "POST":
            return self._create(collection, body)
        version, items = self.api.select(collection, selector)
        if method == "DELETE":
            for item in items:
                self.api.delete(collection, item["metadata"]["name"], body)
        if "fieldSelector" in query:
            uid = query["fieldSelector"].split(",")[0].split("=")[1]
            items = [item for item in items if item["involvedObject"]["uid"] == uid]
        return 200, {"metadata": {"resourceVersion": str(version)}, "items": items}

    def _refusal(self, method: str, path: str) -> str:
        """Returns why the service's account may not make a request; empty if it may."""
        head, _, rest = path.partition("/namespaces/")
        namespace, resource, *name = rest.split("/")
        of_one = {"GET": "get", "PATCH": "patch", "DELETE": "delete"}
        of_all = {"GET": "list", "POST": "create", "DELETE": "deletecollection", "WATCH": "watch"}
        verb = (of_one if name else of_all)[method]
        group = "" if head == "/api/v1" else head.split("/")[2]
        resource = "/".join([resource, *name[1:]])
        if (group, resource, verb) in RIGHTS and (verb, resource) not in self.api.forbidden:
            return ""
        who = 'User "system:serviceaccount:convoy:jobs"'
        return f'{resource} is forbidden: {who} cannot {verb} resource "{resource}" in the namespace "{namespace}"'

    def _one(self, method: str, path: str, name: list[str], query: dict[str, str], body: Object) -> tuple[int, Any]:
        item = self.api.get(path, name[0])
        if item is None:
            return 404, f'"{name[0]}" not found'
        if name[1:] == ["log"]:
            lines = [line for line in self.api.logs.get(name[0], []) if line[0][:19] >= query.get("sinceTime", "")[:19]]
            return 200, "".join(f"{stamp} {text}\n" for stamp, text in lines).encode()[: int(query["limitBytes"])]
        if method == "DELETE":
            return self.api.delete(path, name[0], body), {}
        if method == "PATCH":
            assert self.headers["Content-Type"] == "application/merge-patch+json"
            resource = path.rpartition("/")[2]
            self.api.change(resource, name[0], lambda known: known["metadata"].update(body["metadata"]))
        return 200, self.api.get(path, name[0])

    def _create(self, path: str, item: Object) -> tuple[int, Any]:
        if self.api.get(path, item["metadata"]["name"]) is not None:
            return 409, f'"{item["metadata"]["name"]}" already exists'
        if problems := schema_problems([item]):
            return 422, "; ".join(problems)
        return 201, self.api.add(path, item)

    def _watch(self, path: str, query: dict[str, str]) -> None:
        selector = dict(part.split("=") for part in query["labelSelector"].split(","))
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")
        self.end_headers()

        def send(event: Object) -> None:
            line = json.dumps(event).encode() + b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))

        try:
            self.api.watch(path, selector, int(query["resourceVersion"]), send)
            self.wfile.write(b"0\r\n\r\n")
        except OSError:  # the client has left
            pass

    def _refuse(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        content = json.dumps({"kind": "Status", "code": status, "message": message}).encode()
        self._send(status, content, headers or {})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content)), "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def wait_for(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Returns when a condition holds."""
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)
