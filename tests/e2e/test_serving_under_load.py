"""Good callers beside idle and slow connections, and while versions and servers are replaced: small benchmarks."""

from pathlib import Path

import pytest

from benchmarks.connections import FRONTS, MODEL, measure
from benchmarks.replacements import failures, roll, swap
from tests.serving.onnx_models import write_repository
from tests.serving.server_process import ServerProcess

NOISE_MS = 10
"""By which a busy machine may delay half of the requests."""


@pytest.mark.parametrize("front", FRONTS)
def test_good_callers_beside_idle_and_slow_connections(front: str, tmp_path: Path) -> None:
    write_repository(tmp_path / "models")
    arguments = ["--model-control-mode", "explicit", "--load-model", MODEL, "--device", "cpu"]
    transport = "native" if front == "http" else front
    server = ServerProcess("--model-repository", str(tmp_path / "models"), "--transport", transport, *arguments)
    try:
        port = server.http_port() if front == "http" else int(server.target().rpartition(":")[2])
        measured = measure(front, port, idle=200, slow=50, seconds=0.7)
    finally:
        server.close()
    assert measured["failed"] == 0
    assert measured["open"] == 250
    assert measured["beside_ms"] < 1.5 * measured["alone_ms"] + NOISE_MS


def test_no_request_fails_while_versions_are_swapped(tmp_path: Path) -> None:
    outcome = swap("native", tmp_path / "models", 3)
    assert failures(outcome) == []
    assert len(outcome.load.times_ms) > 50


def test_no_request_fails_while_servers_are_replaced(tmp_path: Path) -> None:
    outcome = roll("grpcio", tmp_path / "models", 2)
    assert failures(outcome) == []
    assert len(outcome.load.times_ms) > 50
