"""`GET /openapi.json`: the REST API as an OpenAPI 3.1 document (https://spec.openapis.org/oas/v3.1.1.html)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.routing import Route

from convoy.version import convoy_version
from trainer.service.jobs import JobState
from trainer.service.methods import DEFAULT_PAGE, MAX_PAGE

Json = dict[str, Any]

OPENAPI_VERSION = "3.1.1"

_ANY: Json = {"type": "object"}
_TEXT: Json = {"type": "string"}
_COUNT: Json = {"type": "integer", "minimum": 0}
_TEXTS: Json = {"type": "array", "items": _TEXT}
_NUMBERS: Json = {"type": "array", "items": {"type": "integer"}}
_TIME: Json = {"type": "number", "description": "Seconds since 1970."}
_BY_NAME: Json = {"type": "object", "additionalProperties": _TEXT}
_STATE: Json = {"type": "string", "enum": [state.value for state in JobState]}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(properties: Json, *, optional: Sequence[str] = ()) -> Json:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


_SPEC: Json = {
    "arguments": _TEXTS | {"description": "Options of trainer/main.py, without --run-dir."},
    "engine": _TEXT | {"default": "local"},
    "min_nodes": _COUNT | {"default": 1},
    "max_nodes": _COUNT | {"default": 1},
    "gpus": _COUNT | {"description": "Of each host; 0: computes on CPUs."},
    "cpus": _COUNT | {"description": "Of each host; 0: all, or with GPUs none of its own."},
    "ranks": _COUNT | {"description": "Processes of each host; 0: one for each GPU, or 1."},
    "memory_mb": _COUNT | {"description": "0: no limit."},
    "priority": {"type": "integer"},
    "max_retries": _COUNT | {"default": 2},
    "working_folder": _TEXT | {"description": "Absolute; empty: that of the service."},
    "run_folder": _TEXT | {"description": "Absolute; may hold {id}, the job's number. Empty: runs/job-NUMBER."},
    "environment": _BY_NAME,
    "engine_options": _BY_NAME,
}
_JOB: Json = {
    "id": _COUNT,
    "owner": _TEXT,
    "key": _or_null(_TEXT),
    "state": _STATE,
    "reason": _TEXT,
    "attempt": _COUNT,
    "num_retries": _COUNT,
    "submitted_at": _TIME,
    "started_at": _or_null(_TIME),
    "ended_at": _or_null(_TIME),
    "exit_code": _or_null({"type": "integer"}),
    "failing_rank": _or_null(_COUNT),
    "spec": _ref("JobSpec"),
    "devices": _object({"gpus": _TEXTS, "cpus": _NUMBERS}),
    "step": _COUNT,
    "epoch": _COUNT,
    "figures": _ANY | {"description": "The newest value of each figure, such as train_loss."},
    "last_event": _COUNT,
}
_MISTAKE: Json = {
    **dict.fromkeys(("label", "predicted"), _TEXT),
    "confidence": {"type": "number"},
    **dict.fromkeys(("channels", "height", "width"), _COUNT),
    "pixels": _TEXT | {"contentEncoding": "base64", "description": "uint8 [channels, height, width]."},
}
_MISTAKES: Json = {"type": "array", "items": _object(_MISTAKE)}
_SCHEMAS: Json = {
    "Error": _object({"error": _TEXT}),
    "JobSpec": _object(_SPEC, optional=[name for name in _SPEC if name != "arguments"]),
    "Submission": _object(
        {"spec": _ref("JobSpec"), "key": _TEXT, "dry_run": {"type": "boolean"}}, optional=("key", "dry_run")
    ),
    "Job": _object(_JOB),
    "Jobs": _object({"jobs": {"type": "array", "items": _ref("Job")}, "next_before": _or_null(_COUNT)}),
    "Plan": _object({"command": _TEXTS, "notes": _TEXTS}),
    "Event": _object(
        {
            "number": _COUNT,
            "time": _TIME,
            "kind": {"enum": ["state", "progress", "note"]},
            "state": _STATE,
            "reason": _TEXT,
            "attempt": _COUNT,
            "line": _ANY | {"description": "A line of the run's metrics.jsonl."},
            "text": _TEXT,
        },
        optional=("state", "reason", "attempt", "line", "text"),
    ),
    "Capacity": _object(
        {
            "engine": _TEXT,
            "queues_itself": {"type": "boolean"},
            **dict.fromkeys(("gpus", "cpus", "gpus_in_use", "cpus_in_use"), _COUNT),
            "active_jobs": _NUMBERS,
        }
    ),
    "Mistakes": _object({"epochs": {"type": "array", "items": _object({"epoch": _COUNT, "mistakes": _MISTAKES})}}),
    "Cancellation": _object({"now": {"type": "boolean"}}, optional=("now",)),
}


def _parameter(name: str, description: str, schema: Json, *, place: str = "query") -> Json:
    return {"name": name, "in": place, "description": description, "schema": schema}


_FLAG: Json = {"type": "boolean", "default": False}
_STATES: Json = {"type": "array", "items": _STATE}


@dataclass(frozen=True, slots=True)
class _Operation:
    """What the document says of an endpoint.

    Args:
        answers: status codes with the schemas of their JSON, or a content type; None for no body.
        body: name of the schema of its body.
        parameters: beside those in the path.
    """

    summary: str
    answers: dict[str, Json | str | None]
    body: str | None = None
    parameters: tuple[Json, ...] = ()


_OPERATIONS = {
    "submit_job": _Operation(
        "Submit a training",
        {"201": _ref("Job"), "200": _ref("Plan")},
        "Submission",
        (
            _parameter(
                "Idempotency-Key",
                "Once more with the same body: the job of then.",
                _TEXT,
                place="header",
            ),
        ),
    ),
    "list_jobs": _Operation(
        "List jobs, newest first",
        {"200": _ref("Jobs")},
        parameters=(
            _parameter("state", "Only jobs in these states.", _STATES),
            _parameter("before", "Only jobs of smaller numbers: the next page.", _COUNT),
            _parameter("limit", "Jobs at most.", _COUNT | {"default": DEFAULT_PAGE, "maximum": MAX_PAGE}),
        ),
    ),
    "get_job": _Operation("A job", {"200": _ref("Job")}),
    "delete_job": _Operation("Delete a job that has ended; its run folder stays", {"204": None}),
    "cancel_job": _Operation(
        "Have a job save and end; again, or now: at once", {"200": _ref("Job")}, body="Cancellation"
    ),
    "retry_job": _Operation("Continue a job that failed, was cancelled or lost", {"200": _ref("Job")}),
    "watch_job": _Operation(
        "Events of a job as server-sent events, each with an Event as data, until the job has ended",
        {"200": "text/event-stream", "204": None},
        parameters=(
            _parameter("after", "Only events after the one of this number.", _COUNT),
            _parameter("Last-Event-ID", "The same, as browsers send it when they reconnect.", _COUNT, place="header"),
        ),
    ),
    "stream_logs": _Operation(
        "Output of a job; with Accept: text/event-stream as events, which have their place in the log as id",
        {"200": "text/plain", "204": None},
        parameters=(
            _parameter("follow", "Go on until the job has ended.", _FLAG),
            _parameter("tail", "Begin with the last lines only.", _COUNT),
            _parameter("attempt", "Another attempt than the last one.", _COUNT),
            _parameter("rank", "Only the output of this rank.", _COUNT),
            _parameter("after", "Only what follows this place, the id of an event: ATTEMPT:OFFSET.", _TEXT),
            _parameter("Last-Event-ID", "The same, as browsers send it when they reconnect.", _TEXT, place="header"),
        ),
    ),
    "get_mistakes": _Operation(
        "Validation images that the run's network classifies wrongly, after each epoch", {"200": _ref("Mistakes")}
    ),
    "get_capacity": _Operation(
        "What an engine has, and what its jobs use",
        {"200": _ref("Capacity")},
        parameters=(_parameter("engine", "The engine.", _TEXT | {"default": "local"}),),
    ),
    "live": _Operation("Whether the service answers", {"200": _ANY}),
    "ready": _Operation("Whether the store of the jobs answers", {"200": _ANY}),
}
"""By the names of the endpoints."""
_OPEN = ("live", "ready")


def describe_api(routes: Sequence[Route], *, has_tokens: bool) -> Json:
    """Returns the document.

    Args:
        routes: those of the API.
        has_tokens: whether callers must send one.
    """
    paths: Json = {}
    for route in routes:
        path = route.path.replace(":number}", "}")
        (method,) = (route.methods or set()) - {"HEAD"}
        paths.setdefault(path, {})[method.lower()] = _described(route.name, path)
    document: Json = {
        "openapi": OPENAPI_VERSION,
        "info": {"title": "Convoy training", "version": convoy_version(), "description": "Trainings as jobs."},
        "paths": paths,
        "components": {"schemas": _SCHEMAS},
    }
    if has_tokens:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
    return document


def _described(name: str, path: str) -> Json:
    operation = _OPERATIONS[name]
    answers: Json = {status: _answer(content) for status, content in operation.answers.items()}
    described: Json = {
        "operationId": name,
        "summary": operation.summary,
        "responses": {**answers, "default": {**_answer(_ref("Error")), "description": "Error"}},
    }
    in_path = [
        {"name": found, "in": "path", "required": True, "schema": _COUNT} for found in re.findall(r"\{(\w+)", path)
    ]
    if in_path or operation.parameters:
        described["parameters"] = [*in_path, *operation.parameters]
    if operation.body:
        is_needed = operation.body == "Submission"
        content = {"application/json": {"schema": _ref(operation.body)}}
        described["requestBody"] = {"required": is_needed, "content": content}
    if name in _OPEN:
        described["security"] = []
    return described


def _answer(content: Json | str | None) -> Json:
    if content is None:
        return {"description": "Success, without a body"}
    kind, schema = (content, _TEXT) if isinstance(content, str) else ("application/json", content)
    return {"description": "Success", "content": {kind: {"schema": schema}}}
