"""Downloads against a server with the faults of real ones."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_set import QUICK, FaultyServer, begin, cut_once, resumable, slow, stalled, unmeasured, whole

from trainer.data.published.collect import SourceError
from trainer.data.published.download import TooSlow, connect_within, download

DATA = bytes(range(256)) * 800


def fetch(server: FaultyServer, folder: Path, **changes: Any) -> bytes:
    target = folder / "file"
    terms = {"max_bytes": len(DATA), "limits": QUICK, "progress": lambda *_: None, **changes}
    download(f"{server.url}file", target, **terms)
    return target.read_bytes()


def test_a_whole_file_arrives_and_progress_is_told(server: FaultyServer, tmp_path: Path) -> None:
    server.routes["/file"] = whole(DATA)
    seen: list[tuple[str, int, int | None]] = []
    assert fetch(server, tmp_path, progress=lambda *step: seen.append(step)) == DATA
    assert seen[-1] == ("file", len(DATA), len(DATA))


def test_a_file_without_a_promised_length_arrives(server: FaultyServer, tmp_path: Path) -> None:
    server.routes["/file"] = unmeasured(DATA)
    assert fetch(server, tmp_path) == DATA


def test_cut_off_is_resumed_where_it_stopped(server: FaultyServer, tmp_path: Path) -> None:
    server.routes["/file"] = resumable(DATA, piece_bytes=len(DATA) // 2 + 1)
    assert fetch(server, tmp_path) == DATA
    assert server.ranges == [None, f"bytes={len(DATA) // 2 + 1}-"]


def test_cut_off_restarts_where_range_is_ignored(server: FaultyServer, tmp_path: Path) -> None:
    server.routes["/file"] = cut_once(DATA, 1000)
    assert fetch(server, tmp_path) == DATA


def test_cut_off_again_and_again_is_given_up(server: FaultyServer, tmp_path: Path) -> None:
    server.routes["/file"] = resumable(DATA, piece_bytes=100)
    with pytest.raises(SourceError, match="cut off 3 times, last at 300 bytes"):
        fetch(server, tmp_path)
    assert server.requests["/file"] == 3


def test_resumed_at_the_wrong_place_is_refused(server: FaultyServer, tmp_path: Path) -> None:
    def answer(handler: Any) -> None:
        if handler.headers.get("Range"):
            begin(handler, 10, 206, Content_Range=f"bytes 5-14/{len(DATA)}")
        else:
            begin(handler, len(DATA))
            handler.wfile.write(DATA[:100])

    server.routes["/file"] = answer
    with pytest.raises(SourceError, match="resumed at the wrong place"):
        fetch(server, tmp_path)


def test_a_stall_is_given_up(server: FaultyServer, tmp_path: Path) -> None:
    server.routes["/file"] = stalled(DATA, 1000, server.released, threading.Event())
    started = time.monotonic()
    with pytest.raises(SourceError, match="stalled"):
        fetch(server, tmp_path)
    assert time.monotonic() - started < 3


def test_a_server_that_says_nothing_is_given_up(server: FaultyServer, tmp_path: Path) -> None:
    server.routes["/file"] = lambda _handler: assert_released(server)
    with pytest.raises(SourceError, match="did not answer in time"):
        fetch(server, tmp_path)


def assert_released(server: FaultyServer) -> None:
    assert server.released.wait(30)


def test_a_trickle_is_given_up(server: FaultyServer, tmp_path: Path) -> None:
    server.routes["/file"] = slow(DATA, 500, server.released)
    with pytest.raises(TooSlow, match=r"too slow \(\d+ kB/s\)"):
        fetch(server, tmp_path)


@pytest.mark.parametrize("promise", [True, False])
def test_more_than_the_file_has_is_refused(server: FaultyServer, tmp_path: Path, promise: bool) -> None:
    server.routes["/file"] = whole(DATA) if promise else unmeasured(DATA)
    with pytest.raises(SourceError, match="more than the"):
        fetch(server, tmp_path, max_bytes=len(DATA) - 1)


@pytest.mark.parametrize(
    ("body", "kind"), [(b"<p>Log in first", "text/html"), (b"\n<!DOCTYPE html>", "text/plain"), (b"<HTML>", "x/y")]
)
def test_a_web_page_is_told_from_a_file(server: FaultyServer, tmp_path: Path, body: bytes, kind: str) -> None:
    def answer(handler: Any) -> None:
        begin(handler, len(body), Content_Type=kind)
        handler.wfile.write(body)

    server.routes["/file"] = answer
    with pytest.raises(SourceError, match="web page"):
        fetch(server, tmp_path)


def test_a_missing_file_is_named_by_its_status(server: FaultyServer, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="answered 404"):
        fetch(server, tmp_path)


def test_a_closed_port_is_given_up_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(SourceError, match="cannot be reached"):
        download(
            f"http://127.0.0.1:{port}/file",
            tmp_path / "file",
            max_bytes=1,
            limits=QUICK,
            progress=lambda *_: None,
        )


def test_an_unknown_name_is_given_up_at_once(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"its name cannot be resolved|did not answer in time"):
        download(
            "http://no-such-host.invalid/file",
            tmp_path / "file",
            max_bytes=1,
            limits=QUICK,
            progress=lambda *_: None,
        )


def test_a_silent_name_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def hang(*_args: object, **_options: object) -> list[Any]:
        released.wait(30)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    try:
        with pytest.raises(TimeoutError):
            connect_within(("example.invalid", 80), 0.1)
    finally:
        released.set()


@pytest.fixture
def black_hole() -> Iterator[int]:
    """A port that takes no connection and refuses none: its queue is full."""
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


def test_an_unreachable_address_leaves_time_for_the_next(
    server: FaultyServer, black_hole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = int(server.url.rsplit(":", 1)[1].rstrip("/"))
    kinds = (socket.AF_INET, socket.SOCK_STREAM, 0, "")
    places = [(*kinds, ("127.0.0.1", port)) for port in (black_hole, black_hole, good)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: places)
    started = time.monotonic()
    with connect_within(("two-homes.invalid", 80), 0.6) as connection:
        assert connection.getpeername()[1] == good
    assert time.monotonic() - started > 0.3  # two of three shares


def test_unreachable_addresses_share_one_time_out(black_hole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", black_hole))] * 4
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: places)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        connect_within(("nowhere.invalid", 80), 0.4)
    assert time.monotonic() - started < 1
