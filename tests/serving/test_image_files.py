"""Image files in place of pixels, over gRPC and HTTP, with Triton's clients and curl."""

import io
import json
import re
import struct
import subprocess
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.http as triton_http
from PIL import Image
from tritonclient.utils import InferenceServerException

from convoy.preprocessing import Preprocessing
from protos import grpc_service_pb2 as pb
from serving.client import Client
from serving.client.cli import main
from serving.client.images import ImageFile
from serving.config import ServeConfig, TransportChoice
from serving.inference import decoder
from serving.inference.image_files import decode_file
from tests.drawings import drawings
from tests.serving.conftest import SERVICE, Served, serve, tensor
from tests.serving.image_models import COLOURS, write_colours, write_digits
from trainer.data import Dataset

RGB = {"red": (230, 20, 30), "green": (20, 200, 40), "blue": (30, 20, 220)}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, mini: Dataset) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_colours(folder)
    write_colours(folder, "alone", rows=0)
    cached = write_colours(folder, "cached") / "config.pbtxt"
    cached.write_text(cached.read_text() + "response_cache { enable: true }")
    write_digits(folder, mini.train.images[:, 0].numpy(), mini.train.labels.numpy())
    return folder


def served_by(transport: TransportChoice, repository: Path) -> Iterator[Served]:
    yield from serve(
        ServeConfig(
            model_repository=repository,
            transport=transport,
            grpc_port=0,
            http_port=0,
            metrics_port=0,
            device="cpu",
            num_threads=1,
            max_message_bytes=4 << 20,
        )
    )


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[Served]:
    yield from served_by("native", repository)


@pytest.fixture(scope="module")
def grpcio_server(repository: Path) -> Iterator[Served]:
    yield from served_by("grpcio", repository)


@pytest.fixture(scope="module")
def url(server: Served) -> str:
    return f"http://127.0.0.1:{server.server.http.port}"


def picture(colour: str, kind: str = "PNG", size: tuple[int, int] = (60, 40), **options: Any) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, RGB[colour]).save(content, kind, **options)
    return content.getvalue()


def metrics(server: Served) -> str:
    return httpx.get(f"http://127.0.0.1:{server.server.http.metrics_port}/metrics").text


def num_decoded(server: Served) -> int:
    return int(float(metrics(server).split("\nconvoy_decoded_images_total ")[1].split()[0]))


def prepared(content: bytes) -> np.ndarray:
    return Preprocessing().prepare(Image.open(io.BytesIO(content)), (3, 4, 4))


FILES = [picture(colour, kind) for colour, kind in zip(COLOURS, ("JPEG", "PNG", "WEBP"), strict=True)]


# ---- Files are seen as in training ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shape"), [("server", (3,)), ("server", (3, 1)), ("grpcio_server", (3,))])
def test_grpc_with_raw_contents(request: pytest.FixtureRequest, name: str, shape: tuple[int, ...]) -> None:
    server = request.getfixturevalue(name)
    with triton.InferenceServerClient(server.target) as client:
        files = client.infer("colours", [tensor("images", np.array(FILES, object).reshape(shape))])
        pixels = client.infer("colours", [tensor("images", np.stack([prepared(file) for file in FILES]))])
    assert files.as_numpy("logits").argmax(axis=1).tolist() == [0, 1, 2]
    np.testing.assert_array_equal(files.as_numpy("logits"), pixels.as_numpy("logits"))


def test_grpc_with_typed_contents(server: Served) -> None:
    request = pb.ModelInferRequest(model_name="colours", id="a")
    request.inputs.add(name="images", datatype="BYTES", shape=[2]).contents.bytes_contents.extend(FILES[:2])
    call = server.channel.unary_unary(
        SERVICE + "ModelInfer", pb.ModelInferRequest.SerializeToString, pb.ModelInferResponse.FromString
    )
    response = call(request, timeout=60)
    assert (response.id, list(response.outputs[0].shape)) == ("a", [2, 3])


def test_http_with_binary_data(url: str) -> None:
    given = triton_http.InferInput("images", [3], "BYTES")
    given.set_data_from_numpy(np.array(FILES, object))
    with triton_http.InferenceServerClient(url.removeprefix("http://")) as client:
        for binary in (True, False):
            wanted = triton_http.InferRequestedOutput("logits", binary_data=binary)
            response = client.infer("colours", [given], outputs=[wanted], request_id="b")
            assert response.as_numpy("logits").argmax(axis=1).tolist() == [0, 1, 2]
            assert response.get_response()["id"] == "b"


def test_a_model_without_a_batch_dimension_takes_one_file(server: Served) -> None:
    one, two = (tensor("images", np.array(FILES[1 : 1 + number], object)) for number in (1, 2))
    with triton.InferenceServerClient(server.target) as client:
        assert client.infer("alone", [one]).as_numpy("logits").argmax() == 1
        with pytest.raises(InferenceServerException, match=r"1 to 1, got .*2"):
            client.infer("alone", [two])


def test_files_share_batches_with_tensors(server: Served) -> None:
    files = [tensor("images", np.array(FILES[:1] * 4, object))]
    pixels = [tensor("images", np.stack([prepared(FILES[1])] * 4))]
    with triton.InferenceServerClient(server.target) as client, ThreadPoolExecutor(2) as pool:
        before = executions(client)
        client.infer("colours", files)
        for wait in (0.0, 0.02, 0.05):  # a machine under load may take too long to decode
            first = pool.submit(client.infer, "colours", files)
            time.sleep(wait)
            client.infer("colours", pixels)
            first.result()
        after = executions(client)
    assert after[0] - before[0] == 28
    assert after[1] - before[1] < 7, "each of the requests had a batch of its own"


def executions(client: triton.InferenceServerClient) -> tuple[int, int]:
    [stats] = client.get_inference_statistics("colours").model_stats
    return stats.inference_count, stats.execution_count


def test_files_that_the_response_cache_knows_are_not_decoded(server: Served, url: str) -> None:
    given = tensor("images", np.array(FILES, object))
    typed = pb.ModelInferRequest(model_name="cached")
    typed.inputs.add(name="images", datatype="BYTES", shape=[3, 1]).contents.bytes_contents.extend(FILES)
    call = server.channel.unary_unary(
        SERVICE + "ModelInfer", pb.ModelInferRequest.SerializeToString, pb.ModelInferResponse.FromString
    )
    before = num_decoded(server)
    with triton.InferenceServerClient(server.target) as client:
        logits = client.infer("cached", [given]).as_numpy("logits")
        assert num_decoded(server) == before + 3
        wanted = [triton.InferRequestedOutput("logits")]
        np.testing.assert_array_equal(client.infer("cached", [given], outputs=wanted).as_numpy("logits"), logits)
        assert call(typed, timeout=60).raw_output_contents[0] == logits.tobytes()
        form = [("file", file) for file in FILES]
        classified = httpx.post(f"{url}/v2/models/cached/classify", files=form, timeout=60).json()
        assert [image["predictions"][0]["label"] for image in classified["images"]] == list(COLOURS)
        assert num_decoded(server) == before + 3
        client.infer("cached", [tensor("images", np.array(FILES[:2], object))])
        assert num_decoded(server) == before + 5
        for _ in range(2):
            with pytest.raises(InferenceServerException, match="image 2 of 2 cannot be used"):
                client.infer("cached", [tensor("images", np.array([FILES[0], b"a cat"], object))])
        [stats] = client.get_inference_statistics("cached").model_stats
    counts = stats.inference_stats
    assert (counts.cache_hit.count, counts.cache_miss.count, counts.success.count) == (3, 2, 5)


# ---- While files are decoded -----------------------------------------------------------------------------------------


def test_a_time_out_counts_the_decoding(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "decode_file", lambda *given: (time.sleep(0.3), decode_file(*given))[1])
    with triton.InferenceServerClient(server.target) as client, pytest.raises(InferenceServerException) as caught:
        client.infer("colours", [tensor("images", np.array(FILES[:1], object))], timeout=200_000)
    assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"


@pytest.mark.parametrize("name", ["server", "grpcio_server"])
def test_a_call_that_is_cancelled_is_counted(
    request: pytest.FixtureRequest, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, began, go_on = request.getfixturevalue(name), threading.Event(), threading.Event()
    monkeypatch.setattr(decoder, "decode_file", lambda *given: (began.set(), go_on.wait(60), decode_file(*given))[2])
    with triton.InferenceServerClient(server.target) as client:
        files = [tensor("images", np.array(FILES[:1], object))]
        call = client.async_infer("colours", files, lambda result, error: None)
        assert began.wait(60)
        call.cancel()
        until = time.monotonic() + 60
        while 'refused_requests_total{model="colours",reason="cancelled"} 1.0' not in metrics(server):
            assert time.monotonic() < until
            time.sleep(0.02)
    go_on.set()


def test_durations_begin_before_the_decoding(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "decode_file", lambda *given: (time.sleep(0.3), decode_file(*given))[1])
    statistics = server.server.repository.get("alone").statistics
    before = statistics.snapshot()
    with triton.InferenceServerClient(server.target) as client:
        began = time.monotonic_ns()
        client.infer("alone", [tensor("images", np.array(FILES[:1], object))])
        took_ns = time.monotonic_ns() - began
    after = statistics.snapshot()
    assert 0.3e9 <= after.success.ns - before.success.ns <= took_ns
    assert 0 <= after.queue.ns - before.queue.ns <= took_ns - 0.3e9, "it was not queued yet"


def test_nothing_is_decoded_for_a_request_that_does_not_fit(server: Served) -> None:
    before = num_decoded(server)
    with triton.InferenceServerClient(server.target) as client:
        wanted = [triton.InferRequestedOutput("nothing")]
        with pytest.raises(InferenceServerException, match="unexpected inference output 'nothing'"):
            client.infer("colours", [tensor("images", np.array(FILES, object))], outputs=wanted)
    assert num_decoded(server) == before


# ---- What costs one refusal ------------------------------------------------------------------------------------------


def png(width: int, height: int, *, num_chunks: int = 0) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"zzZz", b"") * num_chunks
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")


def animation(kind: str) -> bytes:
    content = io.BytesIO()
    frames = [Image.new("RGB", (9, 9), colour) for colour in RGB.values()]
    frames[0].save(content, kind, save_all=True, append_images=frames[1:])
    return content.getvalue()


def noise() -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()


SCAN = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00\0"


def with_scans(content: bytes) -> bytes:
    """Returns a JPEG file with 120 further scans, half of which begin at even places."""
    return content[:-2] + 120 * SCAN + content[-2:]


def scan_by_scan() -> bytes:
    """Returns a file whose first scan has one component."""
    content = picture("red", "JPEG")
    return with_scans(content.replace(b"\xff\xda\x00\x0c\x03", SCAN + b"\xff\xda\x00\x0c\x03"))


REFUSED = {
    "bomb": (png(30_000, 30_000), "million pixels: scale it down"),
    "large": (png(9000, 9000), "9000 x 9000 pixels, and at most 67 million"),
    "animated webp": (animation("WEBP"), "it is an animation"),
    "animated png": (animation("PNG"), "it is an animation"),
    "gif": (animation("GIF"), "expected a JPEG, PNG or WebP file"),
    "truncated": (noise()[:-200], "the image cannot be used: .*truncated"),
    "text": (b"a cat", "expected a JPEG, PNG or WebP file"),
    "empty": (b"", "expected a JPEG, PNG or WebP file"),
    "progressive": (with_scans(picture("red", "JPEG", progressive=True)), "more than 100 scans"),
    "scans": (scan_by_scan(), "more than 100 scans"),
    "scans after the last": (with_scans(picture("red", "JPEG")), "the image cannot be used: .*broken"),
    # A megabyte of them took half a second of the server.
    "chunks": (png(9, 9, num_chunks=20_000), "it consists of too many parts"),
    "comments": (picture("red", "JPEG")[:2] + b"\xff\xfe\0\2" * 20_000, "it consists of too many parts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_used_is_refused(server: Served, url: str, name: str) -> None:
    content, reason = REFUSED[name]
    before = num_decoded(server)
    with triton.InferenceServerClient(server.target) as client:
        with pytest.raises(InferenceServerException, match=reason) as raised:
            client.infer("colours", [tensor("images", np.array([content], object))])
        assert raised.value.status() == "StatusCode.INVALID_ARGUMENT"
    response = httpx.post(f"{url}/v2/models/colours/classify", content=content, headers={"content-type": "image/png"})
    assert response.status_code == 400
    assert re.search(reason, response.json()["error"])
    assert num_decoded(server) - before == (2 if name in ("truncated", "scans after the last") else 0)


def test_one_bad_file_of_many_is_named_before_any_is_decoded(server: Served) -> None:
    before = num_decoded(server)
    with triton.InferenceServerClient(server.target) as client:
        with pytest.raises(InferenceServerException, match="image 3 of 3 cannot be used: it has more than"):
            client.infer("colours", [tensor("images", np.array([*FILES[:2], png(30_000, 30_000)], object))])
        with pytest.raises(InferenceServerException, match="more than 268 million pixels together"):
            client.infer("colours", [tensor("images", np.array([png(8000, 8000)] * 5, object))])
    assert num_decoded(server) == before


def test_the_command_line_names_files_that_are_refused_and_classifies_the_others(
    server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, content in enumerate((FILES[0], b"no image", FILES[1])):
        (tmp_path / f"{number}.png").write_bytes(content)
    options = ("--model", "colours", "--target", server.target, "--send-files", "--json", "--top-k", "1")
    with pytest.raises(SystemExit) as exited:
        main(["classify", str(tmp_path), *options])
    out, errors = capsys.readouterr()
    assert exited.value.code == 1
    assert [json.loads(line)["predictions"][0]["label"] for line in out.splitlines()] == ["red", "green"]
    assert errors == f"error: {tmp_path}/1.png: the image cannot be used: expected a JPEG, PNG or WebP file\n"


def test_too_many_files(server: Served, url: str) -> None:
    tiny = picture("red", size=(1, 1))
    with triton.InferenceServerClient(server.target) as client:
        with pytest.raises(InferenceServerException, match=r"n image files, 1 to 8, got .*10000") as raised:
            client.infer("colours", [tensor("images", np.array([tiny] * 10_000, object))])
        assert raised.value.status() == "StatusCode.INVALID_ARGUMENT"
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n' + tiny + b"\r\n"
    form = {"content-type": "multipart/form-data; boundary=b"}
    response = httpx.post(f"{url}/v2/models/colours/classify", content=part * 10_000 + b"--b--\r\n", headers=form)
    assert (response.status_code, "more than 8 files" in response.text) == (400, True)


def test_a_model_without_a_manifest_of_images_takes_none(served: Served) -> None:
    with (
        triton.InferenceServerClient(served.target) as client,
        pytest.raises(InferenceServerException, match="data-type is 'BYTES', but the model expects 'UINT8'"),
    ):
        client.infer("digits", [tensor("images", np.array(FILES[:1], object))])
    response = httpx.post(
        f"http://127.0.0.1:{served.server.http.port}/v2/models/digits/classify", files={"file": FILES[0]}
    )
    assert (response.status_code, "does not take image files" in response.text) == (400, True)


# ---- classify -------------------------------------------------------------------------------------------------------


def curl(*arguments: str | Path) -> Any:
    done = subprocess.run(["curl", "--silent", *arguments], capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


def test_curl_with_several_files(url: str, tmp_path: Path) -> None:
    names = ["a.jpg", "b.png", "größe.webp"]
    for name, content in zip(names, FILES, strict=True):
        (tmp_path / name).write_bytes(content)
    fields = [part for name in names for part in ("-F", f"file=@{tmp_path / name}")]
    response = curl(*fields, f"{url}/v2/models/colours/classify")
    assert (response["model_name"], response["model_version"]) == ("colours", "1")
    assert [image["file"] for image in response["images"]] == names
    assert [image["predictions"][0]["label"] for image in response["images"]] == list(COLOURS)
    [first, *_] = response["images"]
    assert sum(found["probability"] for found in first["predictions"]) == pytest.approx(1, abs=1e-5)
    assert {found["index"] for found in first["predictions"]} == {0, 1, 2}


def test_curl_with_a_body(url: str, tmp_path: Path) -> None:
    (tmp_path / "a.webp").write_bytes(FILES[2])
    body = ["--data-binary", f"@{tmp_path / 'a.webp'}"]
    response = curl("-H", "Content-Type: image/webp", *body, f"{url}/v2/models/colours/versions/1/classify?top_k=1")
    assert [len(image["predictions"]) for image in response["images"]] == [1]
    assert response["images"][0]["predictions"][0]["label"] == "blue"
    assert (
        "content type application/x-www-form-urlencoded: expected a form"
        in curl(*body, f"{url}/v2/models/colours/classify")["error"]
    )


@pytest.mark.parametrize(
    ("path", "options", "status", "reason"),
    [
        ("colours/classify", {"data": {"file": "a.png"}, "files": {"x": FILES[0]}}, 400, "a field that is no file"),
        (f"colours/classify?top_k=0000000001{'9' * 5000}", {"files": {"file": FILES[0]}}, 400, "top_k must be a"),
        ("colours/classify?top_k=0", {"files": {"file": FILES[0]}}, 400, "top_k must be a positive whole number"),
        ("nothing/classify", {"files": {"file": FILES[0]}}, 404, "unknown model 'nothing'"),
        ("colours/versions/9/classify", {"files": {"file": FILES[0]}}, 404, "9"),
        ("colours/classify", {"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "the form is"),
        (
            "colours/classify",
            {"content": b"--b\r\n", "headers": {"content-type": "multipart/form-data; boundary=b"}},
            400,
            "the form is cut off",
        ),
        ("colours/classify", {"files": {"file": bytes(5 << 20)}}, 413, "too large"),
    ],
)
def test_wrong_uploads(url: str, path: str, options: Any, status: int, reason: str) -> None:
    response = httpx.post(f"{url}/v2/models/{path}", timeout=60, **options)
    assert (response.status_code, reason in response.json()["error"]) == (status, True), response.text


# ---- Digits, and our client ------------------------------------------------------------------------------------------


def test_drawings_are_recognised(url: str, server: Served, tmp_path: Path) -> None:
    """A weak model knows nine of ten digits drawn in grey on white; without this preparation, one or two of ten."""
    drawn = list(drawings(40))
    paths = []
    for number, (image, _) in enumerate(drawn):
        image.save(tmp_path / f"{number:02d}.png")
        paths.append(tmp_path / f"{number:02d}.png")
    files = [("file", (path.name, path.read_bytes())) for path in paths]
    response = httpx.post(f"{url}/v2/models/digits/classify?top_k=1", files=files, timeout=60).json()
    found = [int(image["predictions"][0]["label"]) for image in response["images"]]
    assert np.mean([label == digit for label, (_, digit) in zip(found, drawn, strict=True)]) >= 0.8
    with Client(server.target) as client:
        assert client.image_input("digits").preprocessing == Preprocessing("mnist")
        for images in (paths, [ImageFile.read(path) for path in paths]):
            results = client.classify("digits", images, top_k=1)
            assert [int(result.predictions[0].label) for result in results] == found, "client and server agree"
            assert [result.name for result in results] == [str(path) for path in paths]
            assert not any(result.warning for result in results)
