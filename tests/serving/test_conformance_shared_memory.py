"""System shared memory with Triton's clients and its `utils.shared_memory`, on every front end."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException, serialize_byte_tensor, shared_memory

from serving.config import ServeConfig
from tests.serving.conftest import Served, serve
from tests.serving.onnx_models import WEIGHTS

X = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture(scope="module", params=["native", "grpcio"])
def sharing(request: pytest.FixtureRequest, model_repository: Path) -> Iterator[Served]:
    config = ServeConfig(
        model_repository=str(model_repository),
        model_control_mode="explicit",
        load_model=("rows", "strings", "digits"),
        transport=request.param,
        allow_client_shm=True,
        grpc_port=0,
        http_port=0,
        metrics_port=0,
        device="cpu",
        num_threads=1,
    )
    yield from serve(config)


@pytest.fixture(params=["grpc", "http"])
def connected(request: pytest.FixtureRequest, sharing: Served) -> Iterator[tuple[Any, Any]]:
    """A client and its module."""
    module = triton_grpc if request.param == "grpc" else triton_http
    address = sharing.target if request.param == "grpc" else f"127.0.0.1:{sharing.server.http.port}"
    with module.InferenceServerClient(address) as client:
        client.unregister_cuda_shared_memory()  # as Triton's examples and perf_analyzer do
        yield client, module
        client.unregister_system_shared_memory()


@pytest.fixture
def region() -> Iterator[Any]:
    """Shared memory of 256 bytes."""
    made = shared_memory.create_shared_memory_region("tensors", f"/convoy-test-{os.getpid()}", 256)
    yield made
    shared_memory.destroy_shared_memory_region(made)


def key() -> str:
    return f"/convoy-test-{os.getpid()}"


def given(module: Any, name: str, shape: list[int], kind: str, num_bytes: int, offset: int = 0) -> Any:
    tensor = module.InferInput(name, shape, kind)
    tensor.set_shared_memory("tensors", num_bytes, offset)
    return tensor


def wanted(module: Any, name: str, num_bytes: int, offset: int = 0) -> Any:
    output = module.InferRequestedOutput(name)
    output.set_shared_memory("tensors", num_bytes, offset)
    return output


def statuses(client: Any) -> Any:
    if isinstance(client, triton_http.InferenceServerClient):
        return {status["name"]: status for status in client.get_system_shared_memory_status()}
    regions = client.get_system_shared_memory_status(as_json=True).get("regions", {})
    return dict(regions)


def test_inputs_and_outputs_stay_in_shared_memory(connected: tuple[Any, Any], region: Any) -> None:
    client, module = connected
    shared_memory.set_shared_memory_region(region, [X], offset=16)
    client.register_system_shared_memory("tensors", key(), 240, offset=16)
    status = statuses(client)["tensors"]
    assert (status["key"], int(status["offset"]), int(status["byte_size"])) == (key(), 16, 240)
    for _ in range(2):
        result = client.infer(
            "rows",
            [given(module, "x", [2, 4], "FP32", X.nbytes)],
            outputs=[wanted(module, "echo", 40, 64), module.InferRequestedOutput("product")],
        )
        np.testing.assert_allclose(result.as_numpy("product"), X @ WEIGHTS, atol=1e-5)
        np.testing.assert_array_equal(shared_memory.get_contents_as_numpy(region, np.float32, [2, 4], 16 + 64), X)
        echo = result.get_output("echo")
        assert list(echo.shape if module is triton_grpc else echo["shape"]) == [2, 4]
        # Triton's C++ client takes any parameter of an output over HTTP for one of binary data.
        assert not (echo.parameters if module is triton_grpc else echo.keys() & {"parameters", "data"})
        X[...] += 1
        shared_memory.set_shared_memory_region(region, [X], offset=16)
    client.unregister_system_shared_memory("tensors")
    assert statuses(client) == {}


def test_one_input_in_shared_memory_and_strings_in_both_directions(connected: tuple[Any, Any], region: Any) -> None:
    client, module = connected
    client.register_system_shared_memory("tensors", key(), 256)
    words = np.array([[b"one", b"three"]], object)
    shared_memory.set_shared_memory_region(region, [serialize_byte_tensor(words)])
    size = sum(4 + len(word) for word in words[0])
    result = client.infer(
        "strings", [given(module, "text", [1, 2], "BYTES", size)], outputs=[wanted(module, "echo", 64, 128)]
    )
    assert result.get_output("echo") is not None
    assert shared_memory.get_contents_as_numpy(region, np.object_, [1, 2], 128).tolist() == words.tolist()
    top = module.InferRequestedOutput("probabilities", class_count=2)
    answer = client.infer("digits", [given(module, "images", [1, 1, 4, 4], "UINT8", 16)], outputs=[top])
    assert answer.as_numpy("probabilities")[0, 0].count(b":") == 3


def test_what_does_not_fit_is_refused_by_name(connected: tuple[Any, Any], region: Any) -> None:
    client, module = connected
    x = given(module, "x", [2, 4], "FP32", X.nbytes)
    with pytest.raises(InferenceServerException, match="unable to find system shared memory region 'tensors'"):
        client.infer("rows", [x])
    with pytest.raises(InferenceServerException, match="cannot be opened: No such file"):
        client.register_system_shared_memory("tensors", "/convoy-no-such-object", 8)
    with pytest.raises(InferenceServerException, match="257 bytes from 0 are not inside the 256 bytes"):
        client.register_system_shared_memory("tensors", key(), 257)
    client.register_system_shared_memory("tensors", key(), 256)
    with pytest.raises(InferenceServerException, match="'tensors' is already registered"):
        client.register_system_shared_memory("tensors", key(), 256)
    with pytest.raises(InferenceServerException, match="input 'x': 32 bytes from 240 are not inside the 256 bytes"):
        client.infer("rows", [given(module, "x", [2, 4], "FP32", 32, 240)])
    with pytest.raises(InferenceServerException, match="expected 32 bytes for FP32"):
        client.infer("rows", [given(module, "x", [2, 4], "FP32", 28)])
    with pytest.raises(InferenceServerException, match="output 'echo' has 32 bytes, more than the 31 bytes"):
        client.infer("rows", [x], outputs=[wanted(module, "echo", 31)])
    assert client.infer("rows", [x]).as_numpy("echo").shape == (2, 4)
    assert "system_shared_memory" in str(client.get_server_metadata())
    assert str(client.get_cuda_shared_memory_status()) in ("", "[]")
    with pytest.raises(InferenceServerException, match="unable to find cuda shared memory region 'tensors'"):
        client.get_cuda_shared_memory_status("tensors")


def test_the_api_is_described(sharing: Served) -> None:
    url = f"http://127.0.0.1:{sharing.server.http.port}"
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    assert paths["/v2/systemsharedmemory/region/{region}/register"]["post"]["requestBody"]
    body = {"key": "a", "byte_size": "8"}
    refused = httpx.post(f"{url}/v2/systemsharedmemory/region/r/register", json=body)
    assert (refused.status_code, "byte_size" in refused.json()["error"]) == (400, True)
