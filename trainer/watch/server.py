"""The page of watched runs, on this machine: the training service's routes for reading, over run folders.

There is nothing to submit, to cancel or to continue here, and so every request is a GET.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from convoy.http_server import Server, open_listener, server_sent_event
from convoy.web.page import page_routes
from trainer.errors import ConfigError
from trainer.records.metrics import METRICS_FILE
from trainer.records.mistakes import read_mistakes
from trainer.watch.run import State, WatchedRun, state_of

HOST = "127.0.0.1"
REFRESH_INTERVAL_S = 0.5
KEEP_ALIVE_S = 15.0
GRACE_S = 1
_STATES = {
    State.RUNNING: "RUNNING",
    State.FINISHED: "SUCCEEDED",
    State.FAILED: "FAILED",
    State.STOPPED: "CANCELLED",
}
"""A run's state as that of a job."""


def serve_runs(runs: Sequence[WatchedRun], port: int) -> None:
    """Serves the page until Ctrl-C.

    Args:
        port: 0 for any that is free.

    Raises:
        ConfigError: the port is not available.
    """
    try:
        listener = open_listener(HOST, port)
    except OSError:
        raise ConfigError(f"--port {port}: the port is not available; --port 0 takes any that is free") from None
    app = build_app([run.path for run in runs], is_ending=lambda: server.should_exit)
    server = Server(app, None, timeout_graceful_shutdown=GRACE_S)
    with listener:
        print(f"http://{HOST}:{listener.getsockname()[1]}/  (Ctrl-C ends the page, not the runs)", flush=True)
        server.run(sockets=[listener])


def build_app(folders: Sequence[Path], is_ending: Callable[[], bool] = lambda: False) -> Starlette:
    """Returns the routes of the runs, whose numbers follow the order of their folders, and of the page.

    Args:
        is_ending: whether the server is to end: streams end, so that it need not wait for them.
    """

    def find(request: Request) -> tuple[int, WatchedRun]:
        number = int(request.path_params["id"])
        if not 1 <= number <= len(folders):
            raise HTTPException(404, f"no run {number}")
        return number, WatchedRun.open(folders[number - 1])

    listing = RunList(folders)

    def list_runs(request: Request) -> Response:
        return JSONResponse({"jobs": listing.jobs(), "next_before": None})

    def get_run(request: Request) -> Response:
        return JSONResponse(_to_job(*find(request)))

    def get_mistakes(request: Request) -> Response:
        return JSONResponse({"epochs": read_mistakes(find(request)[1].path)})

    def watch_run(request: Request) -> Response:
        _, run = find(request)
        last = request.headers.get("last-event-id") or request.query_params.get("after") or "0"
        after = int(last) if re.fullmatch("[0-9]{1,10}", last) else 0
        if run.state is not State.RUNNING and after > len(run.lines):
            return Response(status_code=204)  # a browser connects no more
        if request.method == "HEAD":
            return Response(headers=_NO_STORE, media_type="text/event-stream")
        return StreamingResponse(_events(run, after, is_ending), media_type="text/event-stream", headers=_NO_STORE)

    job = "/v1/jobs/{id:number}"
    routes = [
        Route("/v1/jobs", list_runs),
        Route(job, get_run),
        Route(f"{job}/events", watch_run),
        Route(f"{job}/mistakes", get_mistakes),
    ]
    options = {"learn": {"api": "/v1/jobs", "can_change": False}}
    pages = page_routes(["learn", "lecture"], title="Convoy: runs", options=options)
    return Starlette(
        routes=[*routes, *pages],
        # A web page elsewhere must not read from this server by a name that leads to this machine.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])],
        exception_handlers={HTTPException: _error, ConfigError: _gone},
    )


_NO_STORE = {"cache-control": "no-store"}


async def _events(run: WatchedRun, after: int, is_ending: Callable[[], bool]) -> AsyncIterator[str]:
    """Yields the run's lines after the one of that number, and states, as the training service does for a job."""
    shown, silent_s, state = after, 0.0, None
    while not is_ending():
        if len(run.lines) < shown:  # the run goes on from a checkpoint
            shown = 0
        new = run.lines[shown:]
        for line in new:
            shown += 1
            yield _frame(shown, "progress", {"time": line.get("time"), "line": line})
        if run.state is not state:
            state = run.state
            is_end = state is not State.RUNNING
            data = {"state": _STATES[state], "reason": run.reason, "attempt": 1}
            yield _frame(len(run.lines) + is_end, "state", data)
            if is_end:
                return
        silent_s = 0.0 if new else silent_s + REFRESH_INTERVAL_S
        if silent_s >= KEEP_ALIVE_S:
            silent_s = 0.0
            yield ": keep-alive\n\n"
        await asyncio.sleep(REFRESH_INTERVAL_S)
        run.refresh()


def _frame(number: int, kind: str, data: dict[str, Any]) -> str:
    return server_sent_event(kind, {"number": number, "kind": kind, **data}, number)


class RunList:
    """The list of the runs. Metrics that are as before are not read again: most runs of a long list have ended."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._known: dict[Path, tuple[tuple[int, int], dict[str, Any]]] = {}
        """By folder: the metrics' modification time and size, and what was read then."""

    def jobs(self) -> list[dict[str, Any]]:
        """Returns the runs as they are now, last first, without those whose folders have been moved or deleted."""
        found = []
        for number, folder in enumerate(self._folders, start=1):
            with suppress(ConfigError):
                found.append(self._job(number, folder))
        return found[::-1]

    def _job(self, number: int, folder: Path) -> dict[str, Any]:
        try:
            status = (folder / METRICS_FILE).stat()
        except OSError:  # not written yet, or gone with its folder
            return _to_job(number, WatchedRun.open(folder))
        written = status.st_mtime_ns, status.st_size
        before = self._known.get(folder)
        if before is None or before[0] != written:
            before = self._known[folder] = written, _to_job(number, WatchedRun.open(folder))
        state, reason = state_of(folder)
        return {**before[1], "state": _STATES[state], "reason": reason}


def _to_job(number: int, run: WatchedRun) -> dict[str, Any]:
    figures = {name: value for line in run.lines for name, value in line.items()}
    return {
        "id": number,
        "name": run.name,
        "state": _STATES[run.state],
        "reason": run.reason,
        "spec": {"run_folder": str(run.path.resolve()), "arguments": []},
        "step": run.step,
        "epoch": run.epoch,
        "num_steps": run.num_steps,
        "num_epochs": run.num_epochs,
        "figures": figures,
    }


async def _error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code)


async def _gone(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 404)
