"""The HTTP front end: one server for the API, and one for metrics and health that the API cannot hold up."""

from functools import partial

from convoy.auth import TokenFile
from convoy.same_origin import host_check
from convoy.tls import TlsFiles
from serving.errors import StartupError
from serving.frontends.common.services import Services
from serving.frontends.http.app import build_app, build_metrics_app
from serving.frontends.http.connections import METRICS_CONNECTIONS, max_connections
from serving.frontends.http.server import HttpServer
from serving.frontends.http.settings import HttpSettings
from serving.observability.metrics import Metrics

LINGER_S = 0.25
"""How long the API answers with 503 when it stops, before it closes the port and idle connections."""


class HttpFrontend:
    """A `Frontend` for HTTP: the API on `port`, metrics and health on `metrics_port`. Both are set by `start`.

    Args:
        max_message_bytes: size of the largest request body, and of the largest response.
        tokens: of which clients of the API must send one, except for health checks; None for no authentication.
        tls: for the API; None for plain text. The metrics have no TLS.
        access_log: whether the access log gets an entry when a request to the API ends.
    """

    def __init__(
        self,
        services: Services,
        settings: HttpSettings,
        *,
        max_message_bytes: int,
        tokens: TokenFile | None = None,
        tls: TlsFiles | None = None,
        access_log: bool = False,
    ) -> None:
        self.port = 0
        self.metrics_port = 0
        self._settings = settings
        self._tls = tls
        metrics_hosts = host_check(settings.metrics_host or settings.host, settings.cors_origins)
        inference = services.inference
        refusals = inference.refusals
        self.metrics = Metrics(services.admin.repository, refusals, inference.decoder, inference.message_memory)
        build_api = partial(
            build_app,
            services,
            max_body_bytes=max_message_bytes,
            tokens=tokens,
            access_log=access_log,
            settings=settings,
        )
        self._api_server = HttpServer("http", build_api, max_connections=max_connections, refusals=refusals)
        self._metrics_server = HttpServer(
            "http-metrics",
            lambda server: build_metrics_app(services.admin, self.metrics.render, tokens, metrics_hosts),
            max_connections=lambda: METRICS_CONNECTIONS,
            refusals=refusals,
        )

    def start(self) -> None:
        """Starts to listen.

        Raises:
            StartupError: a port is not available.
        """
        context = None if self._tls is None else self._tls.server_context()
        settings = self._settings
        self._api_server.listen(settings.host, settings.port, reuse_port=settings.reuse_port)
        self.port = self._api_server.port
        if settings.metrics_port is not None:
            try:
                self._metrics_server.listen(settings.metrics_host or settings.host, settings.metrics_port)
            except StartupError:
                self._api_server.close()
                raise
            self.metrics_port = self._metrics_server.port
            self._metrics_server.start()
        self._api_server.start(context)

    def stop(self, grace_s: float) -> None:
        """Refuses new requests, finishes those in flight within `grace_s`, then closes all connections.

        Metrics and health are served until then.
        """
        self._api_server.stop(grace_s, linger_s=min(LINGER_S, grace_s))
        self._metrics_server.stop(1)
