"""Calls from web pages of other origins, and the description of the API."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import jsonschema
import pytest
from openapi_spec_validator import validate

from convoy.auth import TokenFile
from serving.config import ServeConfig
from serving.errors import StartupError
from serving.frontends.common.auth import SCOPES
from serving.frontends.http import HttpFrontend, HttpSettings
from tests.serving.conftest import serve
from tests.serving.fake_repository import FakeRepository, make_services
from tests.serving.frontends.http.conftest import MAX_BODY
from tests.serving.image_models import write_colours

PAGE = "https://shop.example:8443"
OTHER = "https://evil.example"
INFER = "/v2/models/twice/infer"
BODY = {"inputs": [{"name": "numbers", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}]}
PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type, inference-header-content-length",
}


@pytest.fixture(scope="module")
def open_api(repository: FakeRepository, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server with a token that one page may call."""
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text("secret\n")
    path.chmod(0o600)
    address = HttpSettings(host="127.0.0.1", port=0, metrics_port=0, cors_origins=("http://localhost:3000", PAGE))
    server = HttpFrontend(
        make_services(repository), address, max_message_bytes=MAX_BODY, tokens=TokenFile(path, SCOPES)
    )
    server.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=30) as client:
        client.headers["x-metrics"] = str(server.metrics_port)
        yield client
    server.stop(5)


def test_a_browsers_preflight_needs_no_token(open_api: httpx.Client) -> None:
    response = open_api.options(INFER, headers={"origin": PAGE, **PREFLIGHT})
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == PAGE
    assert "POST" in response.headers["access-control-allow-methods"]
    allowed = response.headers["access-control-allow-headers"].lower()
    assert {"authorization", "inference-header-content-length"} <= set(allowed.split(", "))
    assert "access-control-allow-credentials" not in response.headers
    assert "origin" in response.headers["vary"].lower()


def test_a_page_reads_responses_and_refusals(open_api: httpx.Client) -> None:
    token = {"authorization": "Bearer secret"}
    for _ in range(3):  # the second and third take the fast path, unless they have an origin
        response = open_api.post(INFER, json=BODY, headers={"origin": PAGE, **token})
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, PAGE)
        assert "inference-header-content-length" in response.headers["access-control-expose-headers"]
    refused = open_api.post(INFER, json=BODY, headers={"origin": PAGE})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)
    unknown = open_api.get("/v2/models/nothing", headers={"origin": PAGE, **token})
    assert (unknown.status_code, unknown.headers["access-control-allow-origin"]) == (404, PAGE)


def test_another_page_reads_nothing(open_api: httpx.Client) -> None:
    preflight = open_api.options(INFER, headers={"origin": OTHER, **PREFLIGHT})
    assert preflight.status_code == 400
    assert "access-control-allow-origin" not in preflight.headers
    response = open_api.post(INFER, json=BODY, headers={"origin": OTHER, "authorization": "Bearer secret"})
    assert "access-control-allow-origin" not in response.headers


def test_metrics_are_for_no_page(open_api: httpx.Client) -> None:
    url = f"http://127.0.0.1:{open_api.headers['x-metrics']}/metrics"
    assert "access-control-allow-origin" not in httpx.get(url, headers={"origin": PAGE}).headers
    assert httpx.options(url, headers={"origin": PAGE, **PREFLIGHT}).status_code == 405


def test_by_default_no_page_may_call(http: httpx.Client) -> None:
    assert http.options(INFER, headers={"origin": PAGE, **PREFLIGHT}).status_code == 405
    assert "access-control-allow-origin" not in http.get("/v2", headers={"origin": PAGE}).headers


@pytest.mark.parametrize("origin", ["shop.example", "https://shop.example/", "https://*.example", "null", ""])
def test_an_origin_must_be_one(tmp_path: Path, origin: str) -> None:
    with pytest.raises(StartupError, match=r"--cors-origin .*must be http:// or https://"):
        ServeConfig(model_repository=tmp_path, cors_origin=(PAGE, origin)).check()
    ServeConfig(model_repository=tmp_path, cors_origin=(PAGE, "*", "http://[::1]:80")).check()


def test_the_description_is_valid(http: httpx.Client, open_api: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    validate(document)
    assert {"/v2", "/v2/models/{model}/infer", "/v2/models/twice/infer"} <= set(document["paths"])
    assert "/v2/logging" not in document["paths"], "the server does not support it"
    identifiers = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(set(identifiers)) == len(identifiers)
    assert "security" not in document
    guarded = open_api.get("/openapi.json", headers={"authorization": "Bearer secret"}).json()
    validate(guarded)
    assert guarded["security"] == [{"token": []}]
    assert open_api.get("/openapi.json").status_code == 401


def test_the_description_has_the_promotions(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    promote = document["paths"]["/v2/repository/models/{model}/promote"]["post"]
    assert promote["summary"] == "Serve a version until a newer one is exported"
    schema = promote["requestBody"]["content"]["application/json"]["schema"]
    jsonschema.validate({"parameters": {"version": 3}}, schema)
    for wrong in ({}, {"parameters": {}}, {"parameters": {"version": 0}}, {"parameters": {"version": "3"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
    back = document["paths"]["/v2/repository/models/{model}/rollback"]["post"]
    jsonschema.validate({}, back["requestBody"]["content"]["application/json"]["schema"])
    for verb in ("promote", "rollback", "pin", "unpin"):
        operation = document["paths"][f"/v2/repository/models/{{model}}/{verb}"]["post"]
        answer = operation["responses"]["200"]["content"]["application/json"]["schema"]
        assert answer == {"$ref": "#/components/schemas/ModelState"}
    assert not any("systemsharedmemory" in path for path in document["paths"]), "it is off"


def test_the_description_has_the_models_tensors(tmp_path: Path) -> None:
    write_colours(tmp_path)
    ports = {"grpc_port": 0, "http_port": 0, "metrics_port": 0}
    for served in serve(ServeConfig(model_repository=tmp_path, device="cpu", num_threads=1, **ports)):  # type: ignore[arg-type]
        url = f"http://127.0.0.1:{served.server.http.port}"
        states = httpx.get(f"{url}/v2/repository/models").json()
        document = httpx.get(f"{url}/openapi.json").json()
        validate(document)
        components = {"components": document["components"]}
        jsonschema.validate(states, document["components"]["schemas"]["ModelStates"] | components)
        assert (
            "multipart/form-data" in document["paths"]["/v2/models/colours/classify"]["post"]["requestBody"]["content"]
        )
        infer = document["paths"]["/v2/models/colours/infer"]["post"]
        schema = infer["requestBody"]["content"]["application/json"]["schema"] | {"components": document["components"]}
        given = {"name": "images", "datatype": "UINT8", "shape": [1, 3, 4, 4], "data": [0] * 48}
        jsonschema.validate({"inputs": [given]}, schema)
        answer = httpx.post(f"{url}/v2/models/colours/infer", json={"inputs": [given]}).json()
        jsonschema.validate(answer, document["components"]["schemas"]["InferResponse"])
        for wrong in ({"shape": [1, 3, 5, 4]}, {"datatype": "FP32"}, {"name": "image"}):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate({"inputs": [given | wrong]}, schema)
        refusal = httpx.post(f"{url}/v2/models/colours/infer", json={"inputs": [given | {"name": "image"}]}).json()
        failed = infer["responses"]["default"]["content"]["application/json"]["schema"] | components
        jsonschema.validate(refusal, failed)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(answer, failed)
