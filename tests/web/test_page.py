"""The page's files, and the server's routes behind it, without a browser."""

import base64
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from PIL import Image

from convoy import auth
from convoy.web.page import CONTENT_SECURITY_POLICY, STATIC
from serving.config import ServeConfig
from serving.errors import StartupError
from serving.frontends.http import live, saved_images
from serving.server import Server
from tests.drawings import drawings
from tests.serving.conftest import serve
from tests.web.conftest import config
from tests.web.models import HOSTILE, RIGHT_TO_LEFT
from trainer.data import load_dataset
from trainer.data.folder.options import FolderOptions

FILES = sorted(path for path in STATIC.iterdir() if path.is_file())
ONE = (Path(__file__).parents[2] / "examples" / "digits" / "1.png").read_bytes()


@pytest.fixture(scope="module")
def http(shown: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{shown.http.port}", timeout=30) as client:
        yield client


def test_page_and_its_files_come_with_types_and_a_strict_policy(http: httpx.Client) -> None:
    page = http.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    types = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    for path in FILES:
        response = http.get(f"/web/{path.name}")
        assert response.content == path.read_bytes()
        assert response.headers["content-type"].startswith(types.get(path.suffix, "text/html"))
        assert response.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
        assert response.headers["x-content-type-options"] == "nosniff"
    assert CONTENT_SECURITY_POLICY.startswith("default-src 'self';")
    assert "unsafe" not in CONTENT_SECURITY_POLICY


def test_a_file_is_sent_again_only_when_it_has_changed(http: httpx.Client) -> None:
    tag = http.get("/web/page.js").headers["etag"]
    known = http.get("/web/page.js", headers={"if-none-match": f'"other", W/{tag}'})
    assert (known.status_code, known.content, known.headers["etag"]) == (304, b"", tag)
    assert known.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", ["/web/none.js", "/web/..%2fpage.py", "/web/%2e%2e/page.py", "/web/static/page.js"])
def test_nothing_else_is_served(http: httpx.Client, path: str) -> None:
    assert http.get(path).status_code == 404


def test_files_need_no_policy_weaker_than_theirs() -> None:
    """A browser would refuse these; this names the file and says it sooner."""
    for path in FILES:
        text = path.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            path
        )
        assert not re.search(r"localStorage|sessionStorage|document\.cookie|indexedDB", text), path
        assert not re.search(r"""(src|href)="https?:|from "https?:|url\(["']?https?:|setAttribute\("style""", text), (
            path
        )
    index = (STATIC / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", index)


def test_each_listed_section_has_its_module(http: httpx.Client) -> None:
    settings = http.get("/web/page.json").json()
    assert settings["sections"][:3] == ["try", "inside", "serve"]
    for name in settings["sections"]:
        assert "export const section" in http.get(f"/web/{name}.js").text
    assert settings["options"]["try"] == {"saves": "corrected", "max_bytes": 64 << 20}


def test_models_are_described_with_reasons_and_accuracy(http: httpx.Client) -> None:
    digits, strange = http.get("/web/api/models").json()
    assert digits["input"] == {"name": "images", "shape": [1, 28, 28], "max_batch_size": 64, "method": "mnist"}
    assert [version["state"] for version in digits["versions"]] == ["UNAVAILABLE", "READY", "UNAVAILABLE"]
    assert "is damaged" in digits["versions"][2]["reason"]
    assert digits["versions"][1]["accuracy"] == 0.95
    assert digits["versions"][1]["exported"].startswith("2026-01-02")
    assert (digits["serving"], digits["before"]) == (2, 1)
    assert strange["labels"] == [HOSTILE, "../../etc", RIGHT_TO_LEFT]


def test_an_image_is_prepared_as_for_an_inference(http: httpx.Client) -> None:
    drawing, digit = next(pair for pair in drawings() if pair[1] == 1)
    png = BytesIO()
    drawing.save(png, "PNG")
    prepared = http.post("/web/api/models/digits/prepare", content=png.getvalue()).json()
    assert (prepared["version"], prepared["shape"]) == ("2", [1, 28, 28])
    pixels = base64.b64decode(prepared["pixels"])
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 1, 28, 28], "data": list(pixels)}
    answer = http.post("/v2/models/digits/infer", json={"inputs": [tensor]}).json()["outputs"][0]["data"]
    classified = http.post("/v2/models/digits/classify", files={"file": png.getvalue()}).json()["images"][0]
    assert answer.index(max(answer)) == classified["predictions"][0]["index"] == digit
    assert classified["predictions"][0]["probability"] == pytest.approx(max(answer), abs=1e-6)


def test_layers_are_those_of_the_network(http: httpx.Client) -> None:
    pixels = base64.b64decode(http.post("/web/api/models/digits/prepare", content=ONE).json()["pixels"])
    layers = http.post("/web/api/models/digits/layers", content=pixels).json()["layers"]
    assert [(layer["operation"], layer["maps"]["shape"]) for layer in layers] == [
        ("Conv", [16, 24, 24]),
        ("Relu", [16, 24, 24]),
        ("MaxPool", [16, 8, 8]),
    ]
    assert [(layer["size"], layer["stride"]) for layer in layers] == [
        ([5, 5], [1, 1]),
        ([5, 5], [1, 1]),
        ([7, 7], [3, 3]),
    ]
    assert layers[0]["filters"]["shape"] == [16, 1, 5, 5]
    assert layers[0]["maps"]["low"] < 0 == layers[1]["maps"]["low"]
    wrong = http.post("/web/api/models/digits/layers", content=b"123")
    assert (wrong.status_code, wrong.json()["error"]) == (400, "expected 784 bytes of pixels, got 3")
    none = http.post("/web/api/models/strange/layers", content=bytes(48))
    assert (none.status_code, "no convolution" in none.json()["error"]) == (400, True)


def test_saved_images_stay_inside_their_folder(
    http: httpx.Client, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(model: str, label: str, content: bytes = ONE) -> httpx.Response:
        return http.post(f"/web/api/models/{model}/save", params={"label": label}, content=content)

    first = save("digits", "7").json()
    assert save("digits", "7").json() == first == {"file": first["file"], "num_images": 1}
    assert (saved / first["file"]).read_bytes() == ONE
    with Image.open(saved / first["file"]) as image:
        assert image.format == "PNG"
    for label in ("10", "", "../7"):
        assert save("digits", label).status_code == 400
    assert save("digits", "7", b"no image").status_code == 400
    assert save("strange", "../../etc").status_code == 200
    assert save("strange", HOSTILE).status_code == 200
    monkeypatch.setattr(saved_images, "MAX_IMAGES", 3)
    assert save("digits", "8").status_code == 429
    assert {path.name for path in saved.iterdir()} == {"7", "%2E.%2F..%2Fetc", quote(HOSTILE, safe=" ")}
    assert not list(saved.rglob(".*"))


def test_saved_images_are_a_data_set(tmp_path: Path) -> None:
    folder = saved_images.SavedImages(tmp_path / "corrected")
    for drawing, digit in drawings(24):
        png = BytesIO()
        drawing.save(png, "PNG")
        folder.save(str(digit % 2), png.getvalue())
    options = FolderOptions(image_size=32)
    dataset = load_dataset(f"folder:{folder.folder}", tmp_path / "data", options, log=lambda line: None)
    assert (dataset.classes, len(dataset.train.labels) + dataset.num_test) == (("0", "1"), 24)


CHANGES = [
    "/web/api/models/digits/save?label=1",
    "/v2/repository/models/digits/promote",
    "/v2/repository/models/digits/unload",
]


@pytest.mark.parametrize("path", CHANGES)
@pytest.mark.parametrize(
    "sent",
    [
        {"origin": "https://evil.example"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "null"},  # of a page without a site, such as a file or a sandboxed frame
        {"sec-fetch-site": "cross-site"},
        {"origin": "http://evil.example", "host": "evil.example"},  # whose name leads to this machine
    ],
)
def test_pages_of_other_sites_change_nothing(http: httpx.Client, path: str, sent: dict[str, str]) -> None:
    response = http.post(path, content=ONE, headers={"content-type": "text/plain", **sent})
    assert (response.status_code, "--cors-origin" in response.json()["error"]) == (403, True)


def test_the_servers_own_page_and_named_pages_may(http: httpx.Client, page_models: Path) -> None:
    own = {"origin": str(http.base_url).rstrip("/"), "sec-fetch-site": "same-origin"}
    assert http.post("/web/api/models/digits/prepare", content=ONE, headers=own).status_code == 200
    other = "https://shop.example"
    for served in serve(config(page_models, cors_origin=(other,), model_control_mode="explicit")):
        url = f"http://127.0.0.1:{served.server.http.port}/v2/repository/models/digits/unload"
        assert httpx.post(url, json={}, headers={"origin": other}, timeout=30).status_code == 200


def test_events_tell_batches_only_while_somebody_watches(shown: Server, http: httpx.Client) -> None:
    batcher = shown.repository.get("digits").batcher
    assert batcher.watch is None
    seen = threading.Event()
    told = http.head("/web/api/events").headers  # which ends at once
    with http.stream("GET", "/web/api/events") as stream:
        assert stream.headers["content-type"] == told["content-type"] == "text/event-stream; charset=utf-8"
        names = []
        for line in stream.iter_lines():
            if line.startswith("event: "):
                names.append(line.removeprefix("event: "))
            if names[-1:] == ["figures"] and not seen.is_set():
                seen.set()
                http_infer(shown)
            if line.startswith("data: ") and names[-1] == "batches":
                assert '"num_requests":1' in line
                assert batcher.watch is not None
                break
        assert names[:3] == ["hello", "models", "figures"]
    deadline = threading.Event()
    for _ in range(100):
        if batcher.watch is None:
            break
        deadline.wait(0.1)
    assert batcher.watch is None


def http_infer(server: Server) -> None:
    response = httpx.post(f"http://127.0.0.1:{server.http.port}/v2/models/digits/classify", files={"file": ONE})
    assert response.status_code == 200


def test_too_many_pages_are_refused(shown: Server, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if all of them come at once."""
    monkeypatch.setattr(live, "MAX_VIEWERS", 2)
    with ExitStack() as stack:
        address = ("127.0.0.1", shown.http.port)
        viewers = [stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(8)]
        for viewer in viewers:
            viewer.sendall(b"GET /web/api/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert Counter(viewer.recv(4096).split()[1] for viewer in viewers) == {b"200": 2, b"429": 6}
    for _ in range(100):  # until the server has noticed that they have left
        with http.stream("GET", "/web/api/events") as stream:
            if stream.status_code == 200:
                return
        time.sleep(0.1)
    pytest.fail("viewers who have left still count")


def test_a_server_with_tokens_shows_the_page_and_no_data_without_one(
    page_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "LOOK_EVERY_S", 0.05)
    tokens = tmp_path / "tokens"
    tokens.write_text("reader name=reader scopes=infer\n")
    tokens.chmod(0o600)
    for served in serve(config(page_models, token_file=tokens)):
        with httpx.Client(base_url=f"http://127.0.0.1:{served.server.http.port}", timeout=30) as http:
            assert http.get("/").status_code == http.get("/web/page.js").status_code == 200
            for path in ("/web/api/models", "/web/api/events"):
                assert http.get(path).status_code == 401
            token = {"authorization": "Bearer reader"}
            assert http.get("/web/api/models", headers=token).status_code == 200
            assert http.post("/web/api/models/digits/prepare", content=ONE, headers=token).status_code == 200
            promotion = http.post("/v2/repository/models/digits/promote", json={}, headers=token)
            assert promotion.status_code == 403
            refused = http.post("/web/api/models/digits/save", params={"label": "1"}, content=ONE, headers=token)
            assert (refused.status_code, "--save-images" in refused.json()["error"]) == (403, True)
            with http.stream("GET", "/web/api/events", headers=token) as stream:
                lines = stream.iter_lines()
                assert next(lines) == "event: hello"
                tokens.unlink()
                for _ in lines:  # until the server ends the stream
                    pass
            assert http.get("/web/api/events", headers=token).status_code == 401


def test_a_server_that_stops_does_not_wait_for_its_viewers(page_models: Path) -> None:
    lines: list[str] = []
    for served in serve(config(page_models)):
        http = httpx.Client(base_url=f"http://127.0.0.1:{served.server.http.port}", timeout=30)
        stream = http.send(http.build_request("GET", "/web/api/events"), stream=True)
        viewer = threading.Thread(target=lambda of=stream: lines.extend(of.iter_lines()))
        viewer.start()
        began = time.monotonic()
    viewer.join(30)
    assert time.monotonic() - began < 20  # the grace period is 30 s
    assert lines[0] == "event: hello"
    http.close()


def test_page_is_on_for_loopback_only_unless_it_is_asked_for(page_models: Path) -> None:
    def shows(**options: object) -> bool:
        return config(page_models, **options).shows_page

    assert shows()
    assert shows(host="::1")
    assert not shows(web="off")
    assert not shows(host="0.0.0.0")
    assert shows(host="0.0.0.0", web="on")
    with pytest.raises(StartupError, match="--save-images needs the page: set --web on"):
        ServeConfig(model_repository="models", web="off", save_images=Path("saved")).check()


def test_without_the_page_there_is_nothing_at_its_paths(page_models: Path) -> None:
    for served in serve(config(page_models, web="off")):
        with httpx.Client(base_url=f"http://127.0.0.1:{served.server.http.port}", timeout=30) as http:
            for path in ("/", "/web/page.js", "/web/page.json", "/web/api/models", "/web/api/events"):
                assert http.get(path).status_code == 404
