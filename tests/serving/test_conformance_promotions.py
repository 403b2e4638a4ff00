"""Which version of a model serves: over gRPC, over HTTP, and on the command line."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from serving.client import Client, ClientError
from serving.config import ServeConfig
from serving.models_command import main
from tests.serving.conftest import Served, serve
from tests.serving.model_files import SCALE_CONFIG, scale, write_config, write_version

X = np.ones((1, 3), np.float32)


@pytest.fixture(scope="module", params=["native", "grpcio"])
def promoting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of one model with two versions, each of which multiplies by its number."""
    folder = tmp_path_factory.mktemp("promoting")
    write_config(folder / "models/m", SCALE_CONFIG)
    for version in (1, 2):
        write_version(folder / "models/m", version, scale(version), manifest={})
    (folder / "tokens").write_text("asks name=a scopes=infer\nchanges name=b scopes=infer,admin\n")
    config = ServeConfig(
        model_repository=folder / "models",
        token_file=folder / "tokens",
        transport=request.param,
        grpc_port=0,
        http_port=0,
        metrics_port=0,
        device="cpu",
        num_threads=1,
    )
    yield from serve(config)


@pytest.fixture
def client(promoting: Served) -> Iterator[Client]:
    with Client(promoting.target, token="changes") as connected:
        yield connected
        if connected.models("m")[0].pinned:
            connected.unpin("m")
        connected.promote("m", 2)


def serves(client: Client) -> float:
    return float(client.infer("m", {"x": X})["y"][0, 0])


def test_over_grpc(client: Client) -> None:
    assert client.promote("m", 1).serving == 1
    (state,) = client.models()
    assert (state.name, state.serving, state.promoted, state.pinned, state.before) == ("m", 1, 1, False, 2)
    assert [(each.version, each.state) for each in state.versions] == [(1, "READY"), (2, "UNAVAILABLE")]
    assert serves(client) == 1
    assert client.roll_back("m").choice == "rolled back from version 1 to version 2"
    assert serves(client) == 2
    assert client.pin("m", 1).pinned
    with pytest.raises(ClientError, match="version 1 is pinned: unpin it first") as caught:
        client.promote("m", 2)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert not client.unpin("m").pinned
    for version, code in ((7, "NOT_FOUND"), (0, "INVALID_ARGUMENT"), (-1, "INVALID_ARGUMENT")):
        with pytest.raises(ClientError) as caught:
            client.promote("m", version)
        assert caught.value.code == code
    with pytest.raises(ClientError, match="unknown model 'n'"):
        client.models("n")


def test_over_http(promoting: Served, client: Client) -> None:
    address = f"http://127.0.0.1:{promoting.server.http.port}/v2/repository/models"
    with httpx.Client(headers={"authorization": "Bearer changes"}) as http:
        response = http.post(f"{address}/m/promote", json={"parameters": {"version": 1}})
        assert (response.status_code, response.json()["serving"], serves(client)) == (200, 1, 1)
        assert http.post(f"{address}/m/rollback").json()["choice"] == "rolled back from version 1 to version 2"
        assert http.post(f"{address}/m/pin", json={"parameters": {"version": 1}}).json()["pinned"] is True
        assert http.post(f"{address}/m/unpin").json()["pinned"] is False
        assert [model["name"] for model in http.get(address).json()] == ["m"]
        assert http.get(f"{address}/m").json()["versions"][0] == {"version": 1, "state": "READY", "reason": ""}
        for path, body, status in (
            ("m/promote", {"parameters": {"version": 7}}, 404),
            ("m/promote", {"parameters": {"version": "1"}}, 400),
            ("m/promote", {"parameters": {"version": True}}, 400),
            ("m/promote", {}, 400),
            ("m/unpin", {}, 400),
            ("n/rollback", {}, 404),
        ):
            assert http.post(f"{address}/{path}", json=body).status_code == status, (path, body)
        assert http.get(f"{address}/n").status_code == 404


def test_only_an_administrator_changes_what_serves(promoting: Served, client: Client) -> None:
    with Client(promoting.target, token="asks") as other:
        assert other.models("m")[0].serving == 2
        for change in (lambda: other.promote("m", 1), lambda: other.unpin("m"), lambda: other.roll_back("m")):
            with pytest.raises(ClientError) as caught:
                change()
            assert caught.value.code == "PERMISSION_DENIED"
    address = f"http://127.0.0.1:{promoting.server.http.port}/v2/repository/models"
    headers = {"authorization": "Bearer asks"}
    assert httpx.get(address, headers=headers).status_code == 200
    assert httpx.post(f"{address}/m/rollback", headers=headers).status_code == 403
    assert httpx.get(address).status_code == 401


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    return int(exited.value.code or 0)


@pytest.fixture(params=["server", "folder"])
def where(request: pytest.FixtureRequest, promoting: Served, client: Client, tmp_path: Path) -> tuple[str, ...]:
    """The options that lead to the server, or to a folder without one."""
    if request.param == "folder":
        write_config(tmp_path / "m", SCALE_CONFIG)
        for version in (1, 2):
            write_version(tmp_path / "m", version, scale(version), manifest={})
        return ("--model-repository", str(tmp_path))
    (tmp_path / "token").write_text("changes")
    return ("--target", promoting.target, "--token-file", str(tmp_path / "token"))


def test_on_the_command_line(where: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("promote", "m", "1", *where) == 0
    assert capsys.readouterr().out.startswith("m serves version 1; version 1 is promoted, 20")
    assert run("list", *where) == 0
    assert "version 1 is promoted" in capsys.readouterr().out
    assert run("rollback", "m", *where, "--json") == 0
    assert '"choice": "rolled back from version 1 to version 2"' in capsys.readouterr().out
    assert run("pin", "m", "1", *where) == 0
    assert run("show", "m", *where) == 0
    assert "m serves version 1; version 1 is pinned, 20" in capsys.readouterr().out
    assert run("promote", "m", "2", *where) == 2
    assert "error: model 'm': version 1 is pinned: unpin it first" in capsys.readouterr().err
    assert run("unpin", "m", *where) == 0
    assert run("promote", "m", "9", *where) == 2
    assert "error: model 'm' has no version 9: it has 1, 2" in capsys.readouterr().err
    assert run("show", "n", *where) == 2
    capsys.readouterr()
    assert run("promote", "", "1", *where) == 2
    assert capsys.readouterr().err == "error: the name of the model is empty\n"


SLOW = """
import pathlib, time

def load(model):
    while model.version == "1" and not (model.folder.parent.parent / "go").exists():
        time.sleep(0.01)

def run(batch):
    return {"y": batch["x"]}
"""


def test_the_command_line_waits_while_a_version_loads(tmp_path: Path) -> None:
    """One that no longer waits can be given again: the change goes on."""
    for version in (1, 2):
        write_version(tmp_path / "m", version, SLOW.encode(), filename="model.py")
    write_config(tmp_path / "m", SCALE_CONFIG.replace('platform: "onnxruntime_onnx"', 'backend: "python"'))
    config = ServeConfig(
        model_repository=tmp_path, allow_model_code=True, grpc_port=0, http_port=0, metrics_port=0, device="cpu"
    )
    for served in serve(config):
        arguments = ("rollback", "m", "--target", served.target, "--timeout-s", "0.5")
        command = [sys.executable, "-m", "convoy", "models", *arguments]
        for is_left in (True, False):
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
                assert process.stderr is not None
                waits = "waiting for the server to load version 1 of m; version 2 serves until then\n"
                assert process.stderr.readline() == waits
                if is_left:
                    process.send_signal(signal.SIGINT)
                else:
                    (tmp_path / "go").touch()
                out, errors = process.communicate(timeout=30)
            if is_left:
                goes_on = "the server goes on loading version 1; convoy models show m shows it"
                assert (process.returncode, out, errors) == (130, "", f"no longer waiting: {goes_on}\n")
            else:
                assert (process.returncode, errors) == (0, "")
                assert out.startswith("m serves version 1; rolled back from version 2 to version 1")
