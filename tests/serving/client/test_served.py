"""The client with the real server, on both transports."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serving.client import Client, ClientError
from serving.client.cli import main
from serving.client.connection import _RetriedCall
from tests.serving.conftest import MAX_MESSAGE_BYTES, Served
from tests.serving.onnx_models import LABELS, LOADED, PIXEL_WEIGHTS, WEIGHTS


@pytest.fixture
def ours(served: Served) -> Iterator[Client]:
    with Client(served.target) as connected:
        yield connected


def test_more_rows_than_the_maximum_batch_size(ours: Client) -> None:
    x = np.random.default_rng(0).normal(size=(101, 4)).astype(np.float32)
    answer = ours.infer("rows", {"x": x}, outputs=["product"])
    np.testing.assert_allclose(answer["product"], x @ WEIGHTS, atol=1e-5)
    assert list(answer.outputs) == ["product"]


def test_classes_are_those_of_the_largest_logits(ours: Client) -> None:
    images = np.random.default_rng(0).integers(0, 256, (11, 1, 4, 4), dtype=np.uint8)
    results = ours.classify("digits", images, top_k=4)
    logits = images.reshape(11, 16).astype(np.float32) @ PIXEL_WEIGHTS
    for result, row in zip(results, logits, strict=True):
        assert [found.index for found in result.predictions] == np.argsort(-row)[:4].tolist()
        assert [found.label for found in result.predictions] == [LABELS[found.index] for found in result.predictions]
        expected = np.exp(row) / np.exp(row).sum()
        assert result.predictions[0].probability == pytest.approx(expected.max(), abs=2e-6)


def test_load_and_unload(ours: Client) -> None:
    assert not ours.is_ready("spare")
    ours.load("spare", config={"max_batch_size": 2})
    assert ours.is_ready("spare")
    assert ours.config("spare").max_batch_size == 2
    assert ours.infer("spare", {"x": np.ones((5, 4), np.float32)})["echo"].shape == (5, 4)
    assert ours.statistics("spare")[0].name == "spare"
    ours.unload("spare")
    with pytest.raises(ClientError, match="NOT_FOUND: model 'spare' has no available versions: unloaded"):
        ours.infer("spare", {"x": np.ones((1, 4), np.float32)})


def test_the_server_s_errors_are_passed_on(ours: Client) -> None:
    with pytest.raises(ClientError, match="NOT_FOUND: unknown model 'nothing': this server has"):
        ours.metadata("nothing")
    with pytest.raises(ClientError, match="INVALID_ARGUMENT: input 'x' of model 'rows': data-type is 'FP64'"):
        ours.infer("rows", {"x": np.ones((1, 4))})
    with pytest.raises(ClientError, match="'rows' is not a classifier: it has no output 'probabilities'"):
        ours.classify("rows", np.zeros((4, 4), np.uint8))


def test_a_request_that_is_too_large_is_sent_once(ours: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    ours.config("whole")
    start_attempt, sent = _RetriedCall._start_attempt, []
    monkeypatch.setattr(_RetriedCall, "_start_attempt", lambda call: sent.append(call) or start_attempt(call))
    with pytest.raises(ClientError, match=rf"RESOURCE_EXHAUSTED: .*larger than max \(\d+ vs\. {MAX_MESSAGE_BYTES}\)"):
        ours.infer("whole", {"x": np.zeros(MAX_MESSAGE_BYTES // 4 + 1, np.float32)})
    assert len(sent) == 1


def test_the_index(ours: Client) -> None:
    assert {model.name for model in ours.index(ready_only=True)} == set(LOADED)


def test_the_command_line(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.tile(np.arange(90, dtype=np.uint8), (60, 1))).save(tmp_path / "a.png")
    with pytest.raises(SystemExit) as left:
        main(["classify", str(tmp_path), "--model", "digits", "--target", served.target, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert (left.value.code, result["file"], len(result["predictions"])) == (0, f"{tmp_path}/a.png", 3)
    with pytest.raises(SystemExit) as left:
        main(["status", "--target", served.target])
    lines = capsys.readouterr().out.splitlines()
    assert left.value.code == 0
    assert lines[0].startswith("convoy ")
    assert lines[0].endswith(f"at {served.target}: ready")
    assert any(line.split()[:3] == ["rows", "1", "READY"] for line in lines)


def test_a_list_of_addresses_names_one_authority(served: Served) -> None:
    """By default gRPC sends the whole list as the authority, and native's HTTP/2 resets such calls."""
    with Client(f"ipv4:{served.target},{served.target}") as connected:
        assert connected.is_live()
