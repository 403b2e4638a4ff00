"""The process of the service: the controller's thread, gRPC, REST, metrics, and their orderly end."""

import asyncio
import logging
import signal
import threading
import traceback
from collections.abc import Iterable

import grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from convoy.auth import TokenFile
from convoy.grpc_core import METADATA_OPTIONS, ignore_clients_faults, keepalive_options
from convoy.http_server import open_listener
from convoy.same_origin import is_loopback
from convoy.tls import TlsFiles
from convoy.web.page import page_routes
from protos import health_pb2
from protos.pool import POOL
from trainer.errors import ConfigError, TrainerError
from trainer.service.controller import Controller
from trainer.service.messages import SERVICE
from trainer.service.methods import SCOPES, Methods
from trainer.service.operations import Operations
from trainer.service.rest.app import build_app
from trainer.service.rest.requests import SameOriginMiddleware
from trainer.service.rest.server import RestServer
from trainer.service.servicer import Servicer
from trainer.service.settings import ServiceConfig
from trainer.service.store import JobStore, StoreError

logger = logging.getLogger("convoy.training")

PASS_EVERY_S = 0.5
GRACE_S = 2.0
"""Time that calls have to end while the service stops. Jobs go on."""
SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),
    *METADATA_OPTIONS,
    *keepalive_options(every_s=60, timeout_s=20),  # a client that is gone without a word must not be served for ever
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # clients look for a frozen host
)
HEALTH = "grpc.health.v1.Health"
SECTIONS = ("learn", "lecture")
"""Of the page."""


class ControllerThread:
    """Makes passes, every half second and whenever it is woken."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._woken = threading.Event()
        self._is_over = False
        self._complaint = ""
        self._thread = threading.Thread(target=self._run, name="controller")

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Has a pass made soon; does not wait for it."""
        self._woken.set()

    def stop(self) -> None:
        """Ends after the pass that is being made, and lets another controller lead."""
        self._is_over = True
        self._woken.set()
        self._thread.join()

    def _run(self) -> None:
        was_leading: bool | None = None
        while not self._is_over:
            self._woken.wait(PASS_EVERY_S)
            self._woken.clear()
            try:
                leads = self._controller.make_pass()
            except TrainerError as error:  # such as a store that is gone for a minute
                self._complain(str(error))
                continue
            except Exception as error:
                self._complain(f"{type(error).__name__}: {error}", traceback.format_exc())
                continue
            self._complain("")
            if leads is not was_leading:
                logger.info("this service leads" if leads else "another service leads: this one answers its callers")
                was_leading = leads
        try:
            self._controller.resign()
        except Exception:
            logger.exception("the lease could not be given up; it ends by itself")

    def _complain(self, complaint: str, details: str = "") -> None:
        """Logs an error once, and its end."""
        if complaint and complaint != self._complaint:
            told = f"{complaint}; jobs go on, and the service tries again every {PASS_EVERY_S:g} s"
            logger.error("%s", "\n".join([told, *details.splitlines()]))
        elif self._complaint and not complaint:
            logger.info("the store can be used again")
        self._complaint = complaint


class JobMetrics:
    """Collects the numbers of jobs when metrics are asked for."""

    def __init__(self, store: JobStore, methods: Methods) -> None:
        self._store = store
        self._methods = methods

    def collect(self) -> Iterable[Metric]:
        gauge = GaugeMetricFamily("convoy_jobs", "Jobs in each state.", labels=["state"])
        try:
            counts = self._store.count()
        except StoreError:  # the controller logs it, once
            counts = {}
        for state, number in counts.items():
            gauge.add_metric([state.value], number)
        yield gauge
        available = float(bool(counts))
        yield GaugeMetricFamily("convoy_job_store_available", "Whether the store of jobs answers.", value=available)
        yield GaugeMetricFamily("convoy_watched_jobs", "Jobs that somebody watches.", value=self._methods.num_watched)


def serve(config: ServiceConfig) -> int:
    """Serves until SIGTERM or Ctrl-C.

    Raises:
        ConfigError: an option is wrong, the store cannot be opened, or an address is in use.
        ValueError: a port cannot exist.
    """
    config.check_ports()
    if not config.is_local and config.token_file is None:
        raise ConfigError(f"--host {config.host}: whoever reaches the service runs programs; give --token-file")
    tls = TlsFiles(config.tls_certificate, config.tls_key) if config.tls_certificate and config.tls_key else None
    if bool(config.tls_certificate) is not bool(config.tls_key):
        raise ConfigError("--tls-certificate and --tls-key belong together")
    tokens = TokenFile(config.token_file, SCOPES) if config.token_file else None
    if tokens and tls is None and not config.is_local:
        logger.warning("tokens travel in plain text: give --tls-certificate and --tls-key")
    with JobStore(config.store) as store:
        return asyncio.run(_serve(config, store, tokens, tls))


async def _serve(config: ServiceConfig, store: JobStore, tokens: TokenFile | None, tls: TlsFiles | None) -> int:
    thread = ControllerThread(controller := Controller(store, config.engine_folder, log=logger.info))
    methods = Methods(Operations(store, controller, thread.wake), tokens)
    ignore_clients_faults()
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers([Servicer(methods, logger.error).handlers(), _health()])
    reflection.enable_server_reflection([SERVICE, HEALTH, reflection.SERVICE_NAME], server, pool=POOL)
    host = f"[{config.host}]" if ":" in config.host else config.host
    port = _open_port(server, f"{host}:{config.port}", tls)
    app = build_app(methods, pages=_pages() if config.shows_page else ())
    rest = RestServer(app, config.host, config.http_port, tls.server_context() if tls else None)
    metrics = RestServer(_metrics_app(JobMetrics(store, methods), config.host), config.host, config.metrics_port, None)
    await server.start()
    await rest.start()
    await metrics.start()
    thread.start()
    over = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, over.set)
    ports = f"grpc {host}:{port}, http {host}:{rest.port}, metrics {host}:{metrics.port}"
    logger.info("serving on %s", ports)
    await over.wait()
    logger.info("stopping; jobs go on")
    await asyncio.gather(server.stop(GRACE_S), rest.stop(GRACE_S), metrics.stop(GRACE_S))
    methods.close()
    await asyncio.to_thread(thread.stop)
    return 0


def _pages() -> list[Route]:
    return page_routes(SECTIONS, title="Convoy training", options={"learn": {"api": "/v1/jobs"}})


def _open_port(server: grpc.aio.Server, address: str, tls: TlsFiles | None) -> int:
    try:
        if tls is None:
            return int(server.add_insecure_port(address))
        files = tls.current()
        return int(server.add_secure_port(address, grpc.ssl_server_credentials([(files.key, files.chain)])))
    except RuntimeError as error:
        host, _, port = address.rpartition(":")
        try:
            open_listener(host.strip("[]"), int(port)).close()  # says why, unlike gRPC
        except OSError as known:
            raise ConfigError(f"{known}: choose another --port") from None
        raise ConfigError(f"cannot listen on {address}: {error}") from None


def _metrics_app(collector: JobMetrics, host: str) -> ASGIApp:
    """Returns `GET /metrics`, which asks for no token, and so answers on loopback as the API without tokens does."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)

    def metrics(request: Request) -> Response:  # not async: it waits for the store
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})

    middleware = [Middleware(SameOriginMiddleware)] if is_loopback(host) else []
    return Starlette(routes=[Route("/metrics", metrics)], middleware=middleware)


def _health() -> grpc.GenericRpcHandler:
    async def check(request: health_pb2.HealthCheckRequest, context: object) -> health_pb2.HealthCheckResponse:
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    handler = grpc.unary_unary_rpc_method_handler(
        check,
        request_deserializer=health_pb2.HealthCheckRequest.FromString,
        response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(HEALTH, {"Check": handler})
