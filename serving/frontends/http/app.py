"""The routes of the REST API (Open Inference Protocol v2 with Triton's extensions), as ASGI applications."""

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from convoy.auth import TokenFile
from convoy.same_origin import HostCheck
from serving.frontends.common.services import Services
from serving.frontends.http.admin import AdminEndpoints, Endpoint, Probed, health_routes, shared_memory_routes
from serving.frontends.http.body_memory import CountedBodies
from serving.frontends.http.classify import ClassifyEndpoint
from serving.frontends.http.counting import counted
from serving.frontends.http.fast_path import FastPath
from serving.frontends.http.infer import InferEndpoint
from serving.frontends.http.middleware import build_middleware, checked_hosts, metrics_middleware
from serving.frontends.http.openapi import describe_api
from serving.frontends.http.page import build_page
from serving.frontends.http.responses import ErrorHandlers, json_response
from serving.frontends.http.server import HttpServer
from serving.frontends.http.settings import HttpSettings
from serving.protocol.admin import AdminService

_UNSUPPORTED_PATHS = (
    "/v2/systemsharedmemory/{rest:path}",
    "/v2/cudasharedmemory/{rest:path}",
    "/v2/trace/setting",
    "/v2/models/{model}/trace/setting",
    "/v2/logging",
    "/v2/models/{model}/generate",
    "/v2/models/{model}/generate_stream",
)
"""Paths of Triton's API that this server does not support; the first one without --allow-client-shm."""


def build_app(
    services: Services,
    server: HttpServer,
    *,
    max_body_bytes: int,
    tokens: TokenFile | None,
    access_log: bool,
    settings: HttpSettings,
) -> ASGIApp:
    """Returns the API, for the running event loop."""
    executor = server.executor("http-body", "large bodies are being read", num_threads=2, max_pending=64)
    server.fast_path = FastPath(
        services.inference,
        executor,
        is_ending=lambda: server.is_stopping or services.admin.health.is_draining,
        max_body_bytes=max_body_bytes,
        tokens=tokens,
        hosts=checked_hosts(server, tokens, settings),
        access_log=access_log,
    )
    bridge = server.fast_path.bridge
    infer = InferEndpoint(services.inference, bridge, executor, max_body_bytes)
    classify = ClassifyEndpoint(services.inference, bridge, executor, max_body_bytes)
    changes = server.executor("http-blocking", "models are being loaded or unloaded", num_threads=16, max_pending=16)
    endpoints = AdminEndpoints(services.admin, changes, executor, max_body_bytes)

    async def openapi(request: Request) -> Response:
        version = services.admin.server_metadata().version
        models = services.admin.repository.ready_models()
        return json_response(describe_api(protocol, models, version, has_tokens=tokens is not None))

    protocol = [*_routes(services.admin, endpoints, infer, classify.classify), Route("/openapi.json", openapi)]
    routes = counted(protocol, services.inference.refusals.calls)
    if settings.page is not None:
        routes += build_page(services, server, settings.page, bridge, max_body_bytes, tokens)
    app = Starlette(
        routes=routes,
        middleware=build_middleware(services, server, tokens, access_log, settings, max_body_bytes),
        exception_handlers=ErrorHandlers(services.inference.refusals, services.inference.repository).by_exception,
    )
    app.router.redirect_slashes = False
    return CountedBodies(app, services.inference.message_memory)


def _routes(admin: AdminService, endpoints: AdminEndpoints, infer: ASGIApp, classify: Endpoint) -> list[Route]:
    """Returns the routes of the protocol and its extensions."""
    model = "/v2/models/{model}"
    version = "/v2/models/{model}/versions/{version}"
    return [  # tried in this order: most requests are inferences
        Route(f"{model}/infer", infer, methods=["POST"]),
        Route(f"{version}/infer", infer, methods=["POST"]),
        *(Route(f"{path}/classify", classify, methods=["POST"]) for path in (model, version)),
        *health_routes(admin),
        Route("/v2", endpoints.server_metadata),
        Route("/v2/models/stats", endpoints.statistics),
        *(Route(f"{path}/ready", endpoints.model_ready) for path in (model, version)),
        *(Route(f"{path}/config", endpoints.model_config) for path in (model, version)),
        *(Route(f"{path}/stats", endpoints.statistics) for path in (model, version)),
        *(Route(path, endpoints.model_metadata) for path in (model, version)),
        Route("/v2/repository/index", endpoints.index, methods=["POST"]),
        Route("/v2/repository/models/{model}/load", endpoints.load, methods=["POST"]),
        Route("/v2/repository/models/{model}/unload", endpoints.unload, methods=["POST"]),
        Route("/v2/repository/models", endpoints.models),
        Route("/v2/repository/models/{model}", endpoints.model_state),
        *(
            Route(f"/v2/repository/models/{{model}}/{change.__name__}", change, methods=["POST"])
            for change in (endpoints.promote, endpoints.rollback, endpoints.pin, endpoints.unpin)
        ),
        *(shared_memory_routes(endpoints) if admin.shared_memory is not None else ()),
        *(Route(path, endpoints.unsupported, methods=["GET", "POST"]) for path in _UNSUPPORTED_PATHS),
    ]


def build_metrics_app(
    admin: Probed, render: Callable[[str], tuple[bytes, str]], tokens: TokenFile | None, hosts: HostCheck | None
) -> ASGIApp:
    """Returns `GET /metrics`, and health for probes that have no client certificate."""

    async def metrics(request: Request) -> Response:
        text, content_type = render(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    routes = [Route("/metrics", metrics), *health_routes(admin)]
    return Starlette(
        routes=routes, middleware=metrics_middleware(tokens, hosts), exception_handlers=ErrorHandlers().by_exception
    )
