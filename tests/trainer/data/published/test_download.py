"""Downloads from a server with the faults of real ones."""

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.trainer.data.faulty_server import FaultyServer, begin, cut_once, slow, stalled, unmeasured, whole
from tests.trainer.data.tiny_dataset import QUICK
from trainer.data.published.download import download
from trainer.data.published.errors import SourceError, TooSlowError

DATA = bytes(range(256)) * 800


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the seconds that pooch waits between two attempts."""
    monkeypatch.setattr("pooch.core.time", SimpleNamespace(sleep=lambda _seconds: None))


def fetch_from(url: str, folder: Path, *, max_bytes: int = len(DATA), **limits: float) -> bytes:
    target = folder / "file"
    quick = replace(QUICK, **limits)  # type: ignore[arg-type]
    download(url, target, max_bytes=max_bytes, limits=quick, progress=lambda *_: None)
    return target.read_bytes()


def fetch(server: FaultyServer, folder: Path, **changes: Any) -> bytes:
    target = folder / "file"
    terms = {"max_bytes": len(DATA), "limits": QUICK, "progress": lambda *_: None, **changes}
    download(f"{server.url}file", target, **terms)
    return target.read_bytes()


def test_a_file_arrives_and_progress_is_reported(server: FaultyServer, tmp_path: Path) -> None:
    server.routes["/file"] = whole(DATA)
    seen: list[tuple[str, int, int | None]] = []
    assert fetch(server, tmp_path, progress=lambda *step: seen.append(step)) == DATA
    assert seen[-1] == ("file", len(DATA), len(DATA))


def test_a_file_without_a_content_length_arrives(server: FaultyServer, tmp_path: Path) -> None:
    server.routes["/file"] = unmeasured(DATA)
    assert fetch(server, tmp_path) == DATA


def test_a_cut_off_download_is_tried_again(server: FaultyServer, tmp_path: Path, no_pause: None) -> None:
    server.routes["/file"] = cut_once(DATA, 1000)
    assert fetch(server, tmp_path) == DATA
    assert server.requests["/file"] == 2


def test_a_download_is_given_up_after_three_attempts(server: FaultyServer, tmp_path: Path, no_pause: None) -> None:
    def answer(handler: Any) -> None:
        begin(handler, len(DATA))
        handler.wfile.write(DATA[:300])

    server.routes["/file"] = answer
    with pytest.raises(SourceError, match="cut off 3 times, last at 300 bytes"):
        fetch(server, tmp_path)
    assert server.requests["/file"] == 3


def test_the_umask_decides_the_mode_of_the_file(server: FaultyServer, tmp_path: Path) -> None:
    server.routes["/file"] = whole(DATA)
    fetch(server, tmp_path)
    (tmp_path / "other").write_text("")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_another_digest_is_refused(server: FaultyServer, tmp_path: Path) -> None:
    server.routes["/file"] = whole(DATA)
    digest = hashlib.sha256(DATA).hexdigest()
    assert fetch(server, tmp_path, sha256_prefix=digest[:8]) == DATA
    (tmp_path / "file").unlink()
    with pytest.raises(SourceError, match=f"sent another file \\(sha256 {digest[:8]}, not 00000000"):
        fetch(server, tmp_path, sha256_prefix="00000000")
    assert list(tmp_path.iterdir()) == []


def test_a_stall_is_given_up_and_leaves_nothing(server: FaultyServer, tmp_path: Path) -> None:
    server.routes["/file"] = stalled(DATA, 1000, server.released, threading.Event())
    started = time.monotonic()
    with pytest.raises(SourceError, match="stalled"):
        fetch(server, tmp_path)
    assert time.monotonic() - started < 3
    assert list(tmp_path.iterdir()) == []


def test_a_silent_server_is_given_up(server: FaultyServer, tmp_path: Path) -> None:
    server.routes["/file"] = lambda _handler: assert_released(server)
    with pytest.raises(SourceError, match="did not answer in time"):
        fetch(server, tmp_path)


def assert_released(server: FaultyServer) -> None:
    assert server.released.wait(30)


def test_a_trickle_is_given_up(server: FaultyServer, tmp_path: Path) -> None:
    server.routes["/file"] = slow(DATA, 500, server.released)
    with pytest.raises(TooSlowError, match=r"too slow \(\d+ kB/s\)"):
        fetch(server, tmp_path)


@pytest.mark.parametrize("promise", [True, False])
def test_too_many_bytes_are_refused(server: FaultyServer, tmp_path: Path, promise: bool) -> None:
    server.routes["/file"] = whole(DATA) if promise else unmeasured(DATA)
    with pytest.raises(SourceError, match="more than the"):
        fetch(server, tmp_path, max_bytes=len(DATA) - 1)


@pytest.mark.parametrize(
    ("body", "kind"), [(b"<p>Log in first", "text/html"), (b"\n<!DOCTYPE html>", "text/plain"), (b"<HTML>", "x/y")]
)
def test_a_web_page_is_refused(server: FaultyServer, tmp_path: Path, body: bytes, kind: str) -> None:
    def answer(handler: Any) -> None:
        begin(handler, len(body), Content_Type=kind)
        handler.wfile.write(body)

    server.routes["/file"] = answer
    with pytest.raises(SourceError, match="web page"):
        fetch(server, tmp_path)


def test_the_status_of_a_missing_file_is_the_reason(server: FaultyServer, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="answered 404"):
        fetch(server, tmp_path)


def test_a_closed_port_is_given_up_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(SourceError, match="cannot be reached"):
        fetch_from(f"http://127.0.0.1:{port}/file", tmp_path)


def test_an_unknown_name_is_given_up_at_once(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"its name cannot be resolved|did not answer in time"):
        fetch_from("http://no-such-host.invalid/file", tmp_path)


def test_a_silent_name_server_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    released = threading.Event()

    def hang(*_args: object, **_options: object) -> list[Any]:
        released.wait(30)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    started = time.monotonic()
    try:
        with pytest.raises(SourceError, match="did not answer in time"):
            fetch_from("http://example.invalid/file", tmp_path, connect_s=0.1)
    finally:
        released.set()
    assert time.monotonic() - started < 1


@pytest.fixture
def black_hole() -> Iterator[int]:
    """A port that neither accepts nor refuses connections: its queue is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]
        for filler in fillers:
            filler.close()


def resolve_to(monkeypatch: pytest.MonkeyPatch, *ports: int) -> None:
    """Makes every name resolve to these ports."""
    kinds = (socket.AF_INET, socket.SOCK_STREAM, 0, "")
    addresses = [(*kinds, ("127.0.0.1", port)) for port in ports]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: addresses)


def test_an_unreachable_address_leaves_time_for_the_next(
    server: FaultyServer, black_hole: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server.routes["/file"] = whole(DATA)
    resolve_to(monkeypatch, black_hole, int(server.url.rsplit(":", 1)[1].rstrip("/")))
    started = time.monotonic()
    assert fetch_from("http://two-homes.invalid/file", tmp_path, connect_s=0.6) == DATA
    assert time.monotonic() - started > 0.25


def test_unreachable_addresses_share_the_time_limit(
    black_hole: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    resolve_to(monkeypatch, *[black_hole] * 4)
    started = time.monotonic()
    with pytest.raises(SourceError, match="did not answer in time"):
        fetch_from("http://nowhere.invalid/file", tmp_path, connect_s=0.4)
    assert time.monotonic() - started < 1


def test_a_late_answer_is_closed(server: FaultyServer, tmp_path: Path) -> None:
    answered = threading.Event()

    def answer(handler: Any) -> None:
        server.released.wait(0.4)
        begin(handler, len(DATA))
        with suppress(ConnectionError):
            for _ in range(1000):  # until the client closes the connection
                handler.wfile.write(DATA)
        answered.set()

    server.routes["/file"] = answer
    with pytest.raises(SourceError, match="did not answer in time"):
        fetch_from(f"{server.url}file", tmp_path, connect_s=0.2)
    assert answered.wait(10)
