"""All endpoints except inference, with Triton's client; and paths that do not exist."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from serving.frontends.common.services import Services
from serving.frontends.http import HttpFrontend
from serving.models.changes import Caller
from tests.serving.fake_repository import PATIENCE_S, Entry, FakeRepository, twice
from tests.serving.frontends.http.conftest import Start

DURATIONS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")


@pytest.fixture(scope="module")
def triton(address: str) -> Iterator[tritonclient.http.InferenceServerClient]:
    with tritonclient.http.InferenceServerClient(address, network_timeout=60) as client:
        yield client


@pytest.fixture
def own(start: Start) -> HttpFrontend:
    return start()


@pytest.fixture
def own_repository(own_services: Services) -> FakeRepository:
    """The repository of `own`, for tests that change it."""
    repository = own_services.admin.repository
    assert isinstance(repository, FakeRepository)
    return repository


def connect(server: HttpFrontend) -> tritonclient.http.InferenceServerClient:
    return tritonclient.http.InferenceServerClient(f"127.0.0.1:{server.port}", network_timeout=60)


def test_health(triton: tritonclient.http.InferenceServerClient, http: httpx.Client) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("twice")
    assert triton.is_model_ready("twice", "1")
    assert not triton.is_model_ready("twice", "2")
    assert not triton.is_model_ready("nothing")
    assert http.get("/v2/health/live").json() == {"live": True}
    assert http.get("/v2/models/twice/ready").json() == {"name": "twice", "ready": True}
    unknown = http.get("/v2/models/nothing/ready")
    assert (unknown.status_code, unknown.json()) == (400, {"name": "nothing", "ready": False}), "as in Triton"
    assert http.head("/v2/health/ready").status_code == 200


def test_not_ready(own: HttpFrontend, own_repository: FakeRepository) -> None:
    own_repository.broken = [Entry("twice", "1", "UNAVAILABLE", "broken")]
    with connect(own) as triton:
        assert not triton.is_model_ready("twice")
        response = httpx.get(f"http://127.0.0.1:{own.port}/v2/models/twice/ready")
        assert (response.status_code, response.json()) == (400, {"name": "twice", "ready": False})
        with pytest.raises(InferenceServerException, match="has no available versions") as raised:
            triton.get_model_metadata("twice")
        assert raised.value.status() == "404"


def test_metadata(triton: tritonclient.http.InferenceServerClient) -> None:
    server = triton.get_server_metadata()
    assert (server["name"], server["version"]) == ("convoy", "1.2.3")
    assert "binary_tensor_data" in server["extensions"]
    assert triton.get_model_metadata("twice") == {
        "name": "twice",
        "versions": ["1", "3"],
        "platform": "python",  # which has no other name, as in Triton
        "inputs": [{"name": "numbers", "datatype": "FP32", "shape": [-1, 3]}],
        "outputs": [
            {"name": "twice", "datatype": "FP32", "shape": [-1, 3]},
            {"name": "sum", "datatype": "FP32", "shape": [-1, 1]},
        ],
    }


def test_configuration_has_numbers_where_triton_has_numbers(triton: tritonclient.http.InferenceServerClient) -> None:
    config = triton.get_model_config("twice", "1")
    assert config["name"] == "twice"
    assert config["max_batch_size"] == 8
    assert config["input"][0]["data_type"] == "TYPE_FP32"
    assert config["input"][0]["dims"] == [3]
    assert config["instance_group"] == []
    assert "dynamic_batching" not in config


def test_statistics_as_perf_analyzer_reads_them(own: HttpFrontend) -> None:
    with connect(own) as triton:
        tensor = tritonclient.http.InferInput("numbers", [2, 3], "FP32")
        tensor.set_data_from_numpy(np.ones((2, 3), np.float32))
        for _ in range(3):
            triton.infer("twice", [tensor])
        for response in (triton.get_inference_statistics(), triton.get_inference_statistics("twice", "1")):
            (statistics,) = response["model_stats"]
            assert (statistics["name"], statistics["version"]) == ("twice", "1")
            assert (statistics["inference_count"], statistics["execution_count"]) == (6, 3)
            for name in DURATIONS:
                assert type(statistics["inference_stats"][name]["count"]) is int
                assert type(statistics["inference_stats"][name]["ns"]) is int
            assert statistics["inference_stats"]["success"]["count"] == 3
            assert statistics["batch_stats"][0]["batch_size"] == 2
        with pytest.raises(InferenceServerException, match="'nothing' is not found"):
            triton.get_inference_statistics("nothing")


class TestRepository:
    def test_index(self, own: HttpFrontend, own_repository: FakeRepository) -> None:
        own_repository.broken = [Entry("other", "4", "UNAVAILABLE", "golden batch differs")]
        ready = {"name": "twice", "version": "1", "state": "READY", "reason": ""}
        with connect(own) as triton:
            assert triton.get_model_repository_index() == [
                ready,
                {"name": "other", "version": "4", "state": "UNAVAILABLE", "reason": "golden batch differs"},
            ]
        assert httpx.post(f"http://127.0.0.1:{own.port}/v2/repository/index", json={"ready": True}).json() == [ready]

    def test_load_and_unload(self, own: HttpFrontend, own_repository: FakeRepository) -> None:
        own_repository.loadable["twice"] = lambda: twice(version="2")
        with connect(own) as triton:
            triton.load_model("twice", config='{"max_batch_size": 4}')
            assert own_repository.configs == ['{"max_batch_size": 4}']
            assert triton.is_model_ready("twice", "2")
            triton.unload_model("twice")
            assert not triton.is_model_ready("twice")
            with pytest.raises(InferenceServerException, match="failed to load 'absent'") as raised:
                triton.load_model("absent")
            assert raised.value.status() == "500"
            with pytest.raises(InferenceServerException, match=r"'file:1/model\.onnx' is not supported") as raised:
                triton.load_model("twice", config="{}", files={"file:1/model.onnx": b"abc"})
            assert raised.value.status() == "501"

    def test_the_server_responds_while_a_model_loads(self, own: HttpFrontend, own_repository: FakeRepository) -> None:
        began, go_on = threading.Event(), threading.Event()

        def load() -> object:
            began.set()
            assert go_on.wait(PATIENCE_S)
            return twice(version="2")

        own_repository.loadable["twice"] = load  # type: ignore[assignment]
        url = f"http://127.0.0.1:{own.port}/v2"
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(httpx.post, f"{url}/repository/models/twice/load", timeout=60)
            assert began.wait(PATIENCE_S)
            assert httpx.get(f"{url}/models/twice").json()["versions"] == ["1"]
            go_on.set()
            assert (loading.result().status_code, loading.result().json()) == (200, {})
        assert httpx.get(f"{url}/models/twice").json()["versions"] == ["1", "2"]

    def test_a_change_learns_that_its_caller_has_gone(
        self, own: HttpFrontend, own_repository: FakeRepository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        began, noticed = threading.Event(), threading.Event()

        def load(name: str, config: str | None, caller: Caller) -> None:
            assert not caller.is_cancelled()
            began.set()
            until = time.monotonic() + PATIENCE_S
            while not caller.is_cancelled() and time.monotonic() < until:
                time.sleep(0.005)
            if caller.is_cancelled():
                noticed.set()

        monkeypatch.setattr(own_repository, "load", load)
        with socket.create_connection(("127.0.0.1", own.port)) as connection:
            connection.sendall(
                b"POST /v2/repository/models/twice/load HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
            )
            assert began.wait(PATIENCE_S)
        assert noticed.wait(PATIENCE_S)

    def test_null_parameters(self, own: HttpFrontend, own_repository: FakeRepository) -> None:
        own_repository.loadable["twice"] = lambda: twice(version="2")
        url = f"http://127.0.0.1:{own.port}/v2/repository"
        assert httpx.post(f"{url}/models/twice/load", json={"parameters": None}).status_code == 200
        assert httpx.post(f"{url}/index", json={"ready": None}).status_code == 200

    @pytest.mark.parametrize("body", [b"[]", b"{", b'{"parameters": []}', b'{"parameters": {"config": {}}}'])
    def test_bad_bodies(self, http: httpx.Client, body: bytes) -> None:
        response = http.post("/v2/repository/models/twice/load", content=body)
        assert response.status_code == 400
        assert response.json()["error"]


def test_the_asynchronous_client(own: HttpFrontend, own_repository: FakeRepository) -> None:
    own_repository.loadable["twice"] = lambda: twice(version="2")

    async def ask() -> None:
        async with tritonclient.http.aio.InferenceServerClient(f"127.0.0.1:{own.port}") as triton:
            assert await triton.is_server_live()
            assert await triton.is_server_ready()
            assert await triton.is_model_ready("twice", "1")
            assert not await triton.is_model_ready("nothing")
            assert (await triton.get_server_metadata())["name"] == "convoy"
            assert (await triton.get_model_metadata("twice"))["versions"] == ["1"]
            assert (await triton.get_model_config("twice"))["max_batch_size"] == 8
            assert [each["name"] for each in (await triton.get_inference_statistics())["model_stats"]] == ["twice"]
            await triton.load_model("twice")
            assert [each["version"] for each in await triton.get_model_repository_index()] == ["1", "2"]
            await triton.unload_model("twice")
            assert not await triton.is_model_ready("twice")
            for refused in (triton.get_trace_settings, triton.get_log_settings, triton.get_system_shared_memory_status):
                with pytest.raises(InferenceServerException) as raised:
                    await refused()
                assert raised.value.status() == "501"

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v2/nothing/", 404),
        ("GET", "/v2/models", 404),
        ("GET", "/v2/models/a%2Fb", 404),
        ("GET", "/v2/models/nothing", 404),
        ("GET", "/v2/models/nothing/config", 404),
        ("GET", "/metrics", 404),
        ("GET", "/v2/models/twice/infer", 405),
        ("POST", "/v2", 405),
        ("DELETE", "/v2/models/twice", 405),
        ("GET", "/v2/repository/index", 405),
        ("GET", "/v2/systemsharedmemory/status", 501),
        ("POST", "/v2/cudasharedmemory/region/r/register", 501),
        ("GET", "/v2/trace/setting", 501),
        ("POST", "/v2/logging", 501),
        ("POST", "/v2/models/twice/generate", 501),
    ],
)
def test_unknown_and_unsupported_paths(http: httpx.Client, method: str, path: str, status: int) -> None:
    response = http.request(method, path)
    assert response.status_code == status
    assert list(response.json()) == ["error"]
    assert ("allow" in response.headers) == (status == 405)
