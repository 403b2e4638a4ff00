"""HTTP and gRPC of one real server give the same responses."""

import re
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from google.protobuf import json_format
from tritonclient.utils import InferenceServerException

from serving.protocol.tensors import DATATYPES
from tests.serving.conftest import MAX_MESSAGE_BYTES, Served
from tests.serving.onnx_models import LABELS, NUMBERS

MODELS = ("rows", "digits", "types", "whole", "versions")


@pytest.fixture
def grpc_client(served: Served) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    with tritonclient.grpc.InferenceServerClient(served.target) as client:
        yield client


@pytest.fixture
def http_client(served: Served) -> Iterator[tritonclient.http.InferenceServerClient]:
    address = f"127.0.0.1:{served.server.http.port}"
    with tritonclient.http.InferenceServerClient(address, network_timeout=60) as client:
        yield client


def test_metadata_and_configuration_are_the_same(
    grpc_client: tritonclient.grpc.InferenceServerClient, http_client: tritonclient.http.InferenceServerClient
) -> None:
    for name in MODELS:
        config = grpc_client.get_model_config(name)
        assert json_format.ParseDict(http_client.get_model_config(name), type(config.config)()) == config.config
        metadata = grpc_client.get_model_metadata(name)
        assert json_format.ParseDict(http_client.get_model_metadata(name), type(metadata)()) == metadata
    index = grpc_client.get_model_repository_index()
    assert json_format.ParseDict({"models": http_client.get_model_repository_index()}, type(index)()) == index


def test_tensors_are_the_same(
    grpc_client: tritonclient.grpc.InferenceServerClient, http_client: tritonclient.http.InferenceServerClient
) -> None:
    arrays = [np.array([[0, 1]]).astype(DATATYPES[name].dtype) for name in NUMBERS]
    responses = []
    for client, kind, binary in (
        (grpc_client, tritonclient.grpc, {}),
        (http_client, tritonclient.http, {}),
        (http_client, tritonclient.http, {"binary_data": False}),
    ):
        metadata = http_client.get_model_metadata("types")
        inputs = []
        for described, array in zip(metadata["inputs"], arrays, strict=True):
            tensor = kind.InferInput(described["name"], [1, 2], described["datatype"])
            tensor.set_data_from_numpy(array, **binary)
            inputs.append(tensor)
        wanted = [kind.InferRequestedOutput(described["name"], **binary) for described in metadata["outputs"]]
        response = client.infer("types", inputs, outputs=wanted)
        responses.append([response.as_numpy(described["name"]) for described in metadata["outputs"]])
    for over_grpc, *over_http in zip(*responses, strict=True):
        for array in over_http:
            np.testing.assert_array_equal(array, over_grpc)


def test_labels(served: Served) -> None:
    tensor = {"name": "images", "shape": [2, 1, 4, 4], "datatype": "UINT8", "data": [[0] * 16, [255] * 16]}
    wanted = [{"name": "probabilities", "parameters": {"classification": 3}}]
    url = f"http://127.0.0.1:{served.server.http.port}/v2/models/digits/infer"
    (output,) = httpx.post(url, json={"inputs": [tensor], "outputs": wanted}, timeout=60).json()["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 3])
    for string in output["data"]:
        value, index, label = string.split(":", 2)
        assert 0 <= float(value) <= 1
        assert label == LABELS[int(index)]


def test_load_and_unload(http_client: tritonclient.http.InferenceServerClient) -> None:
    assert not http_client.is_model_ready("spare")
    http_client.load_model("spare")
    assert http_client.is_model_ready("spare")
    http_client.unload_model("spare")
    assert not http_client.is_model_ready("spare")


def test_metrics_of_all_models(served: Served) -> None:
    text = httpx.get(f"http://127.0.0.1:{served.server.http.metrics_port}/metrics").text
    for name in MODELS:
        assert f'nv_inference_count{{model="{name}",version="' in text
    # Its version is known once a test has tried to load it.
    assert re.search(r'^convoy_model_ready\{model="broken",version="1?"\} 0\.0$', text, re.MULTILINE)
    assert 'convoy_model_ready{model="digits",version="1"} 1.0\n' in text


def test_refused_requests_are_counted_alike(
    served: Served,
    grpc_client: tritonclient.grpc.InferenceServerClient,
    http_client: tritonclient.http.InferenceServerClient,
) -> None:
    def refused() -> dict[tuple[str, str], int]:
        text = httpx.get(f"http://127.0.0.1:{served.server.http.metrics_port}/metrics").text
        found = re.findall(
            r'^convoy_refused_requests_total\{model="(.*)",reason="(.*)"\} (\d+)\.0$', text, re.MULTILINE
        )
        return {(reason, model): int(count) for model, reason, count in found}

    before = refused()
    for client, kind in ((grpc_client, tritonclient.grpc), (http_client, tritonclient.http)):
        tensor = kind.InferInput("rows", [1, 3], "FP64")
        tensor.set_data_from_numpy(np.ones((1, 3)))
        for name in ("rows", "made_up"):
            with pytest.raises(InferenceServerException):
                client.infer(name, [tensor])
        with pytest.raises(InferenceServerException):
            client.infer("rows", [tensor], model_version="9")
    url = f"http://127.0.0.1:{served.server.http.port}/v2/models"
    assert httpx.post(f"{url}/rows/infer", content=b" " * (MAX_MESSAGE_BYTES + 1)).status_code == 413
    assert httpx.post(f"{url}/rows/infer", content=b"{").status_code == 400
    assert httpx.get(f"{url}/rows/infer").status_code == 405
    assert httpx.get(f"{url}/also_made_up").status_code == 404
    counted = {key: count - before.get(key, 0) for key, count in refused().items() if count != before.get(key, 0)}
    assert counted.pop(("not_found", "")) + counted.pop(("not_found", "rows"), 0) == 5
    assert counted == {("invalid_argument", "rows"): 3, ("resource_exhausted", "rows"): 1, ("unimplemented", "rows"): 1}
