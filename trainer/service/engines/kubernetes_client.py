"""Calls of the Kubernetes API with plain JSON: through the official client's configuration, tokens, proxies and TLS.

A call is never retried here. One that may succeed later raises `EngineUnavailableError`; the controller makes another
pass. A 429 or 503 with Retry-After is obeyed: until then no call leaves this process.
"""

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import urllib3
from kubernetes import config
from kubernetes.client import ApiClient, Configuration
from kubernetes.client.exceptions import ApiException

from trainer.errors import ConfigError, TrainerError
from trainer.service.engines.engine import EngineUnavailableError

Object = dict[str, Any]

TIMEOUT_S = (3.0, 10.0)
"""To connect, and for each read."""
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_LONGEST_WAIT_S = 60.0
"""Of a Retry-After that is obeyed."""
MERGE_PATCH = "application/merge-patch+json"


class NotFoundError(TrainerError):
    """There is no such object."""


class ExistsError(TrainerError):
    """An object of that name exists, or is not the one that was meant: 409."""


class ExpiredError(TrainerError):
    """The version from which a watch was to go on is too old: 410."""


class Api:
    """The API server of the cluster that KUBECONFIG, or the service account of this pod, names. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._client: ApiClient | None = None
        self._not_before = 0.0
        self._wait_reason = ""

    def namespace(self) -> str:
        """Returns the namespace of the context, or of this pod."""
        if _is_in_cluster():
            return NAMESPACE_FILE.read_text().strip() if NAMESPACE_FILE.exists() else "default"
        _, active = _load(lambda: config.list_kube_config_contexts(os.environ.get("KUBECONFIG")))
        return str(active["context"].get("namespace") or "default")

    def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = "application/json",
    ) -> Object:
        """Returns the answer of one call.

        Raises:
            ConfigError: the request is wrong, or this account may not make it.
            NotFoundError, ExistsError, ExpiredError: 404, 409, 410.
            EngineUnavailableError: a later call may succeed.
        """
        with self.open(method, path, query=query, body=body, content_type=content_type) as response:
            content: Object = json.loads(self._read(response))
            return content

    def read(self, path: str, query: Mapping[str, str]) -> bytes:
        """Returns the content of a path that is no JSON. Raises as `call` does."""
        with self.open("GET", path, query=query) as response:
            return self._read(response)

    @contextmanager
    def open(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = "application/json",
        timeout_s: tuple[float, float] = TIMEOUT_S,
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        """Context of an answer that has begun well and is not read yet. Raises as `call` does."""
        wait_s = self._not_before - time.monotonic()
        if wait_s > 0:
            raise EngineUnavailableError(f"{self._wait_reason}; the next call is in {wait_s:.0f} s")
        response = self._send(method, path, query, body, content_type, timeout_s)
        if response.status == 401:  # the token has expired: a newer one may be in its file
            response.close()
            self._forget_client()
            response = self._send(method, path, query, body, content_type, timeout_s)
        try:
            if response.status >= 300:
                self._raise(response, f"{method} {path}")
            yield response
        finally:
            response.close()

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Object | None,
        content_type: str,
        timeout_s: tuple[float, float],
    ) -> urllib3.BaseHTTPResponse:
        client = self._opened()
        headers = {"Accept": "application/json, */*"} | ({} if body is None else {"Content-Type": content_type})
        try:
            request = client.param_serialize(
                method,
                path,
                query_params=list((query or {}).items()),
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
            )
            response: urllib3.BaseHTTPResponse = client.call_api(*request, _request_timeout=timeout_s).response
            return response
        except (urllib3.exceptions.HTTPError, ApiException, config.ConfigException, OSError) as error:
            raise EngineUnavailableError(f"{client.configuration.host} cannot be reached: {_plain(error)}") from error

    def _read(self, response: urllib3.BaseHTTPResponse) -> bytes:
        try:
            content: bytes = response.read()
            return content
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise EngineUnavailableError(f"the API server's answer broke off: {_plain(error)}") from error

    def _raise(self, response: urllib3.BaseHTTPResponse, what: str) -> None:
        """Raises the error that an answer means."""
        message = _message(self._read(response)) or f"status {response.status}"
        match response.status:
            case 404:
                raise NotFoundError(f"{what}: {message}")
            case 409 if not what.startswith("POST") or "already exists" in message:  # else a quota's other writer
                raise ExistsError(message)
            case 410:
                raise ExpiredError(message)
            case 403 if "cannot" in message:
                raise ConfigError(f"{_missing_right(message)} (deploy/base/jobs/role.yaml has what Convoy needs)")
            case 400 | 405 | 415 | 422:
                raise ConfigError(f"the cluster refuses it: {message}")
            case 401:
                raise EngineUnavailableError(f"the API server does not accept this account's token: {message}")
        self._obey(response.headers.get("Retry-After", ""), message)
        raise EngineUnavailableError(f"the API server answers {response.status} to {what}: {message}")

    def _obey(self, retry_after: str, message: str) -> None:
        if retry_after.isdecimal():
            self._wait_reason = f"the API server asks to wait: {message}"
            self._not_before = time.monotonic() + min(float(retry_after), _LONGEST_WAIT_S)

    def _opened(self) -> ApiClient:
        with self._lock:
            if self._client is None:
                self._client = ApiClient(_configuration())
            return self._client

    def _forget_client(self) -> None:
        with self._lock:
            self._client = None


def _configuration() -> Configuration:
    settings = Configuration()
    settings.retries = False
    if _is_in_cluster():
        _load(lambda: config.load_incluster_config(settings))
    else:
        _load(lambda: config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=settings))
    return settings


def _is_in_cluster() -> bool:
    return "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ


def _load(load: Any) -> Any:
    try:
        return load()
    except Exception as error:  # a faulty file raises whatever its reader meets
        raise ConfigError(f"--engine kubernetes: no cluster is configured: set KUBECONFIG ({_plain(error)})") from error


def _message(content: bytes) -> str:
    """Returns the message of a Status object, or else the first line of the content."""
    text = content.decode(errors="replace").strip()
    try:
        status = json.loads(text)
        return str(status["message"]) if isinstance(status, dict) else ""
    except (ValueError, KeyError):
        return text.splitlines()[0] if text else ""


def _missing_right(message: str) -> str:
    """Returns the part of a refusal that names the account, the verb and the resource."""
    return message.partition("is forbidden: ")[2] or message


def _plain(error: Exception) -> str:
    if isinstance(error, ApiException):  # of TLS
        return str(error.reason)
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
