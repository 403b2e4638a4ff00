"""The routes and endpoints of the REST API, as an ASGI application."""

from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from convoy.auth import Principal
from protos import training_pb2 as pb
from trainer.errors import ConfigError
from trainer.service.jobs import FINAL, JobState
from trainer.service.json_values import capacity_json, job_json, plan_json
from trainer.service.messages import USER, to_spec
from trainer.service.methods import Methods
from trainer.service.operations import LogRange
from trainer.service.rest.events import LogEvents, lines, server_sent, write_event
from trainer.service.rest.openapi import describe_api
from trainer.service.rest.requests import (
    LIVE,
    READY,
    SameOriginMiddleware,
    flag,
    integer,
    parse_integer,
    parse_position,
    path_number,
    read_message,
)
from trainer.service.rest.responses import HANDLERS, json_response, stream_headers

T = TypeVar("T")
_EVENTS = "text/event-stream"


def build_app(methods: Methods, *, pages: Sequence[BaseRoute] = ()) -> ASGIApp:
    """Returns the API.

    Args:
        pages: routes of static pages, behind the API's own. They need no token.
    """
    endpoints = _Endpoints(methods)
    routes = endpoints.routes()
    document = describe_api(routes, has_tokens=methods.has_tokens)

    async def openapi(request: Request) -> Response:
        return json_response(document)

    app = Starlette(
        routes=[*routes, Route("/openapi.json", openapi), *pages],
        middleware=[] if methods.has_tokens else [Middleware(SameOriginMiddleware)],
        exception_handlers=HANDLERS,
    )
    app.router.redirect_slashes = False
    return app


class _Endpoints:
    def __init__(self, methods: Methods) -> None:
        self._methods = methods

    def routes(self) -> list[Route]:
        job = "/v1/jobs/{id:number}"
        return [
            Route("/v1/jobs", self.submit_job, methods=["POST"]),
            Route("/v1/jobs", self.list_jobs, methods=["GET"]),
            Route(job, self.get_job, methods=["GET"]),
            Route(job, self.delete_job, methods=["DELETE"]),
            Route(f"{job}/cancel", self.cancel_job, methods=["POST"]),
            Route(f"{job}/retry", self.retry_job, methods=["POST"]),
            Route(f"{job}/events", self.watch_job, methods=["GET"]),
            Route(f"{job}/logs", self.stream_logs, methods=["GET"]),
            Route(f"{job}/mistakes", self.get_mistakes, methods=["GET"]),
            Route("/v1/capacity", self.get_capacity, methods=["GET"]),
            Route(LIVE, self.live, methods=["GET"]),
            Route(READY, self.ready, methods=["GET"]),
        ]

    async def submit_job(self, request: Request) -> Response:
        caller = self._caller(request)
        message = await read_message(request, pb.SubmitJobRequest())
        spec = to_spec(message.spec)
        if message.dry_run:
            return json_response(plan_json(await self._methods.plan(spec)))
        key = request.headers.get("idempotency-key") or message.key
        job = await self._methods.submit(caller, spec, key)
        return json_response(job_json(job), 201, {"location": f"/v1/jobs/{job.id}"})

    async def list_jobs(self, request: Request) -> Response:
        caller = self._caller(request)
        states = [_state(name) for name in request.query_params.getlist("state")]
        before, limit = integer(request, "before", 0), integer(request, "limit", 0)
        page = await self._methods.find(caller, states, before or 0, limit or 0)
        return json_response({"jobs": list(map(job_json, page.jobs)), "next_before": page.next_before})

    async def get_job(self, request: Request) -> Response:
        return json_response(job_json(await self._methods.get(self._caller(request), path_number(request))))

    async def delete_job(self, request: Request) -> Response:
        await self._methods.delete(self._caller(request), path_number(request))
        return Response(status_code=204)

    async def cancel_job(self, request: Request) -> Response:
        caller = self._caller(request)
        message = await read_message(request, pb.CancelJobRequest())
        return json_response(job_json(await self._methods.cancel(caller, path_number(request), message.now)))

    async def retry_job(self, request: Request) -> Response:
        return json_response(job_json(await self._methods.retry(self._caller(request), path_number(request))))

    async def watch_job(self, request: Request) -> Response:
        """Streams a job's events; tells a browser that has them all to connect no more (204)."""
        caller, number = self._caller(request), path_number(request)
        last = request.headers.get("last-event-id")
        after = parse_integer(last, "Last-Event-ID") if last else integer(request, "after") or 0
        job = await self._methods.get(caller, number)
        if job.state in FINAL and after >= job.next_event - 1:
            return Response(status_code=204)
        headers = stream_headers()
        if request.method == "HEAD":
            return Response(headers=headers, media_type=_EVENTS)
        events = self._while_valid(request, await self._methods.watch(caller, number, after))
        return StreamingResponse(server_sent(events, write_event), headers=headers, media_type=_EVENTS)

    async def stream_logs(self, request: Request) -> Response:
        """Streams a job's output: as text, or as events, after whose ids a client that lost the connection goes on."""
        caller, number = self._caller(request), path_number(request)
        last, after = request.headers.get("last-event-id"), request.query_params.get("after")
        place = parse_position(last, "Last-Event-ID") if last else parse_position(after, "after") if after else None
        wanted = LogRange(
            follow=flag(request, "follow"),
            tail=integer(request, "tail"),
            attempt=integer(request, "attempt"),
            rank=integer(request, "rank"),
            after=place,
        )
        kind = _EVENTS if _EVENTS in request.headers.get("accept", "") else "text/plain"
        if kind == _EVENTS and place is not None:
            job = await self._methods.get(caller, number)
            if job.state in FINAL and place.attempt > job.attempt:
                return Response(status_code=204)
        chunks = self._while_valid(request, await self._methods.open_log(caller, number, wanted))
        if request.method == "HEAD":
            return Response(headers=stream_headers(), media_type=kind)
        content = server_sent(chunks, LogEvents().write) if kind == _EVENTS else lines(chunks)
        return StreamingResponse(content, headers=stream_headers(), media_type=kind)

    async def get_mistakes(self, request: Request) -> Response:
        return json_response({"epochs": await self._methods.mistakes(self._caller(request), path_number(request))})

    async def get_capacity(self, request: Request) -> Response:
        self._caller(request)
        engine = request.query_params.get("engine", "local")
        return json_response(capacity_json(engine, await self._methods.capacity(engine)))

    async def live(self, request: Request) -> Response:
        return json_response({"live": True})

    async def ready(self, request: Request) -> Response:
        """Answers 503 while the store of the jobs does not answer."""
        await self._methods.check_store()
        return json_response({"ready": True})

    def _caller(self, request: Request) -> Principal:
        return self._methods.identify(request.headers.get("authorization"), request.headers.get(USER))

    def _while_valid(self, request: Request, items: AsyncGenerator[T]) -> AsyncGenerator[T]:
        return self._methods.while_valid(request.headers.get("authorization"), items)


def _state(name: str) -> JobState:
    try:
        return JobState(name.upper())
    except ValueError:
        raise ConfigError(f"state={name[:40]}: must be one of {', '.join(JobState).lower()}") from None
