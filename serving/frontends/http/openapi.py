"""`GET /openapi.json`: the REST API as an OpenAPI 3.1 document, made of the routes and models that there are.

Each model that is ready has paths of its own, with its tensors' names, data types and shapes
(https://spec.openapis.org/oas/v3.1.1.html).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.routing import BaseRoute, Route

from serving.models.repository import Model
from serving.protocol.tensors import TensorSpec

Json = dict[str, Any]

OPENAPI_VERSION = "3.1.1"


def _object(required: Sequence[str], **properties: Json) -> Json:
    """Returns the schema of an object with these properties."""
    return {"type": "object", "required": list(required), "properties": properties}


def _array(items: Json) -> Json:
    return {"type": "array", "items": items}


_ANY: Json = {"type": "object"}
_TEXT: Json = {"type": "string"}
_NAME: Json = {"type": "string", "minLength": 1}
_WHOLE: Json = {"type": "integer", "minimum": 0}
_PREDICTION = _object(("index", "label", "probability"), index=_WHOLE, label=_TEXT, probability={"type": "number"})
_TENSOR = _object(
    ("name", "datatype", "shape"),
    name=_NAME,
    datatype=_NAME,
    shape=_array(_WHOLE),
    parameters=_ANY,
    data={"type": "array"},
)
_VERSION_STATE = _object(
    ("version", "state", "reason"),
    version=_WHOLE,
    state={"enum": ["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]},
    reason=_TEXT,
)
_SCHEMAS: Json = {
    "ModelState": _object(
        ("name", "serving", "versions"),
        name=_NAME,
        serving=_WHOLE | {"description": "The version of requests that name none; 0 if none is ready."},
        promoted=_WHOLE | {"description": "The version that was chosen; 0 if the version policy decides."},
        pinned={"type": "boolean"},
        choice=_TEXT,
        time=_TEXT,
        before=_WHOLE | {"description": "The version that a roll-back would go to; 0 for none."},
        versions=_array(_VERSION_STATE),
        reason=_TEXT | {"description": "Why no version is known, or which should serve is unknown."},
    ),
    "Regions": _array(
        _object(("name", "key", "offset", "byte_size"), name=_NAME, key=_NAME, offset=_WHOLE, byte_size=_WHOLE)
    ),
    "ModelStates": _array({"$ref": "#/components/schemas/ModelState"}),
    "Error": _object(("error",), error=_TEXT),
    "InferRequest": _object(
        ("inputs",),
        id=_TEXT,
        parameters=_ANY,
        inputs=_array(_TENSOR),
        outputs=_array({"type": "object", "required": ["name"]}),
    ),
    "InferResponse": _object(
        ("model_name", "model_version", "outputs"),
        model_name=_NAME,
        model_version=_NAME,
        id=_TEXT,
        outputs=_array(_TENSOR),
    ),
    "Classification": _object(
        ("model_name", "model_version", "images"),
        model_name=_NAME,
        model_version=_NAME,
        images=_array(_object(("file", "predictions"), file=_TEXT, predictions=_array(_PREDICTION))),
    ),
}
_FORM = _object(("file",), file=_array({"type": "string", "contentMediaType": "image/*"}))
_TOP_K: Json = {
    "name": "top_k",
    "in": "query",
    "description": "Number of classes for each image.",
    "schema": {"type": "integer", "minimum": 1, "default": 5},
}


@dataclass(frozen=True, slots=True)
class _Operation:
    """What the document says of an endpoint.

    Args:
        answer: name of the schema of its answer; None for any object.
        bodies: schemas by content type; empty for no body.
        parameters: beside those in the path.
    """

    summary: str
    answer: str | None = None
    bodies: Json = field(default_factory=dict)
    parameters: tuple[Json, ...] = ()


_INFER = _Operation(
    "Run an inference",
    "InferResponse",
    {"application/json": {"$ref": "#/components/schemas/InferRequest"}, "application/octet-stream": {}},
)
_CLASSIFY = _Operation(
    "Classify image files: JPEG, PNG or WebP",
    "Classification",
    {"multipart/form-data": _FORM, "image/*": {}},
    (_TOP_K,),
)
_OBJECT_BODY: Json = {"application/json": _ANY}
_REGION_BODY: Json = {
    "application/json": _object(
        ("key", "byte_size"), key=_NAME, byte_size={"type": "integer", "minimum": 1}, offset=_WHOLE
    )
}


def _version_body(minimum: int) -> Json:
    """Returns the body that names a version; one of 0 may be left out."""
    required = {"required": ["version"]} if minimum else {}
    version = {"type": "object", "properties": {"version": {"type": "integer", "minimum": minimum}}, **required}
    outer = {"required": ["parameters"]} if minimum else {}
    return {"application/json": {"type": "object", "properties": {"parameters": version}, **outer}}


_OPERATIONS = {
    "InferEndpoint": _INFER,
    "classify": _CLASSIFY,
    "live": _Operation("Whether the server answers"),
    "ready": _Operation("Whether every model is ready"),
    "server_metadata": _Operation("Name, version and extensions of the server"),
    "model_ready": _Operation("Whether a model is ready"),
    "model_metadata": _Operation("Versions, inputs and outputs of a model"),
    "model_config": _Operation("Configuration of a model"),
    "statistics": _Operation("Statistics of models"),
    "index": _Operation("All models of the repository and their states", bodies=_OBJECT_BODY),
    "load": _Operation("Load a model, or load it again", bodies=_OBJECT_BODY),
    "unload": _Operation("Unload a model", bodies=_OBJECT_BODY),
    "models": _Operation("Which version of each model serves, and why", "ModelStates"),
    "model_state": _Operation("Which version of a model serves, and why", "ModelState"),
    "promote": _Operation("Serve a version until a newer one is exported", "ModelState", _version_body(1)),
    "rollback": _Operation("Serve the version that served before", "ModelState", _version_body(0)),
    "pin": _Operation("Serve a version, whatever is exported", "ModelState", _version_body(1)),
    "unpin": _Operation("Let newer versions serve again", "ModelState", _OBJECT_BODY),
    "shared_memory_status": _Operation("Registered shared memory", "Regions"),
    "register_shared_memory": _Operation("Register shared memory of this machine", bodies=_REGION_BODY),
    "unregister_shared_memory": _Operation("Forget shared memory", bodies=_OBJECT_BODY),
    "cuda_memory_status": _Operation("Registered shared memory of GPUs: always none", "Regions"),
    "unregister_cuda_memory": _Operation("Does nothing: no shared memory of GPUs is registered", bodies=_OBJECT_BODY),
}
"""By the names of the endpoints. Others are described by their names."""
_LEFT_OUT = ("unsupported", "openapi")


def describe_api(routes: Sequence[BaseRoute], models: Sequence[Model], version: str, *, has_tokens: bool) -> Json:
    """Returns the document.

    Args:
        models: that are ready.
        version: of the server.
        has_tokens: whether clients must send one.
    """
    paths: Json = {}
    for route in routes:
        if isinstance(route, Route) and route.name not in _LEFT_OUT:
            for method in sorted((route.methods or {"POST"}) - {"HEAD"}):
                name = route.name.replace("_", " ").capitalize()
                operation = _OPERATIONS.get(route.name) or _Operation(name)
                paths.setdefault(route.path, {})[method.lower()] = _described(operation, route.path, method)
    for model in sorted(models, key=lambda model: int(model.version)):
        paths |= _model_paths(model)  # of several versions, the newest
    document: Json = {
        "openapi": OPENAPI_VERSION,
        "info": {"title": "Convoy", "version": version, "description": "Open Inference Protocol v2, and more."},
        "paths": paths,
        "components": {"schemas": _SCHEMAS},
    }
    if has_tokens:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
    return document


def _described(operation: _Operation, path: str, method: str) -> Json:
    answer: Json = _ANY if operation.answer is None else {"$ref": f"#/components/schemas/{operation.answer}"}
    error: Json = {"$ref": "#/components/schemas/Error"}
    described: Json = {
        "operationId": f"{method.lower()}{re.sub(r'[^A-Za-z0-9]+', '_', path)}".rstrip("_"),
        "summary": operation.summary,
        "responses": {
            "200": {"description": "Success", "content": {"application/json": {"schema": answer}}},
            "default": {"description": "Error", "content": {"application/json": {"schema": error}}},
        },
    }
    in_path = [{"name": name, "in": "path", "required": True, "schema": _NAME} for name in re.findall(r"\{(\w+)", path)]
    if in_path or operation.parameters:
        described["parameters"] = [*in_path, *operation.parameters]
    if operation.bodies:
        described["requestBody"] = {
            "content": {kind: {"schema": schema} if schema else {} for kind, schema in operation.bodies.items()}
        }
    return described


def _model_paths(model: Model) -> Json:
    """Returns the paths of a model, with its tensors."""
    name = model.spec.name
    bodies = _INFER.bodies | {"application/json": _infer_schema(model)}
    operations = {"infer": _Operation(f"Run an inference of {name}", _INFER.answer, bodies)}
    if model.images is not None:
        operations["classify"] = replace(_CLASSIFY, summary=f"Classify images by {name}")
    paths: Json = {}
    for verb, operation in operations.items():
        path = f"/v2/models/{name}/{verb}"
        paths[path] = {"post": _described(operation, path, "POST") | {"operationId": f"{verb} {name}"}}
    return paths


def _infer_schema(model: Model) -> Json:
    inputs = [shape for spec in model.spec.inputs for shape in _tensor_schemas(spec, model)]
    request: Json = _SCHEMAS["InferRequest"]
    count = len(model.spec.inputs)
    given = {"type": "array", "minItems": count, "maxItems": count, "items": {"oneOf": inputs}}
    names = [spec.name for spec in model.spec.outputs]
    wanted = {"type": "object", "required": ["name"], "properties": {"name": {"enum": names}}}
    properties = request["properties"] | {"inputs": given, "outputs": {"type": "array", "items": wanted}}
    return request | {"properties": properties}


def _tensor_schemas(spec: TensorSpec, model: Model) -> Iterator[Json]:
    """Yields the forms of an input: its own, and files for images."""
    yield _tensor_schema(spec.name, spec.datatype.name, spec.shape)
    if model.images is not None:
        yield _tensor_schema(spec.name, "BYTES", (-1,))


def _tensor_schema(name: str, datatype: str, shape: tuple[int, ...]) -> Json:
    sizes = [{"type": "integer", "minimum": 1} if size == -1 else {"const": size} for size in shape]
    properties = _TENSOR["properties"] | {
        "name": {"const": name},
        "datatype": {"const": datatype},
        "shape": {"type": "array", "prefixItems": sizes, "minItems": len(sizes), "maxItems": len(sizes)},
    }
    return _TENSOR | {"properties": properties}
