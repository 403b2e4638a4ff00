"""A model repository at gs://, with gcsfs and an emulator of Google Cloud Storage's JSON API."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serving.model_files import SCALE_CONFIG, scale, write_config, write_version
from tests.serving.server_process import ServerProcess

ADDRESS = "gs://bucket/models"
PATIENCE_S = 60


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with gcsfs and the emulator, which the project's own environment does not have."""
    folder = tmp_path_factory.mktemp("packages")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
    subprocess.run([*command, "gcsfs", "gcp-storage-emulator"], check=True, timeout=600)
    return folder


@pytest.fixture
def emulator(packages: Path) -> Iterator[str]:
    """The URL of an emulator with an empty bucket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host=127.0.0.1", f"--port={port}"]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(
        [*command, "--in-memory", "--default-bucket=bucket"],
        env={**os.environ, "PYTHONPATH": str(packages)},
        stdout=quiet,
        stderr=quiet,
    ) as process:
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE_S
        while True:
            try:
                httpx.get(f"{url}/storage/v1/b/bucket/o").raise_for_status()
                break
            except httpx.HTTPError:
                assert time.monotonic() < until
                time.sleep(0.1)
        yield url
        process.kill()


def upload(url: str, folder: Path) -> None:
    """Uploads the files of a folder of models."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = f"models/{file.relative_to(folder)}"
        query = {"uploadType": "media", "name": name}
        httpx.post(f"{url}/upload/storage/v1/b/bucket/o", params=query, content=file.read_bytes()).raise_for_status()


def answer(server: ServerProcess) -> float:
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 1, 1]}]}
    url = f"http://127.0.0.1:{server.http_port()}/v2/models/m/infer"
    found: float = httpx.post(url, json=body).raise_for_status().json()["outputs"][0]["data"][0]
    return found


@pytest.mark.installs
def test_a_bucket(packages: Path, emulator: str, tmp_path: Path) -> None:
    write_config(tmp_path / "models/m", SCALE_CONFIG)
    write_version(tmp_path / "models/m", 1, scale(1), manifest={})
    upload(emulator, tmp_path / "models")
    environment = {"PYTHONPATH": str(packages), "STORAGE_EMULATOR_HOST": emulator}
    where = ("--model-repository", ADDRESS, "--model-cache", str(tmp_path / "cache"))
    server = ServerProcess(
        *where, "--model-control-mode", "poll", "--poll-interval-s", "0.2", "--drain-delay-s", "0",
        prefix=("env", *(f"{name}={value}" for name, value in environment.items())),
    )  # fmt: skip
    try:
        server.target()
        assert answer(server) == 1
        write_version(tmp_path / "models/m", 2, scale(2), manifest={})
        upload(emulator, tmp_path / "models")
        server.wait_for("m version 2 ready")
        assert answer(server) == 2
        command = [sys.executable, "-m", "convoy", "models", "promote", "m", "1", *where]
        subprocess.run(command, env={**os.environ, **environment}, check=True, timeout=PATIENCE_S)
        chosen = httpx.get(f"{emulator}/storage/v1/b/bucket/o/models%2Fm%2Fserving.json", params={"alt": "media"})
        assert chosen.raise_for_status().json()["version"] == 1
        until = time.monotonic() + PATIENCE_S
        while answer(server) != 1:
            assert time.monotonic() < until, "".join(server.lines)
            time.sleep(0.1)
        assert server.stop() == 0
        assert not [line for line in server.lines if "Traceback" in line or "credentials" in line]
    finally:
        server.close()
