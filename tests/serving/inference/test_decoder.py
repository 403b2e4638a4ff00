"""Image files are decoded on a few threads, in turns, and within bounds."""

import gc
import io
import queue
import struct
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy as np
import pytest
from PIL import Image

from convoy.images import Pixels
from convoy.preprocessing import Preprocessing
from serving.errors import Cancelled, DeadlineExceeded, Internal, ResourceExhausted, ServingError
from serving.inference import decoder as decoder_module
from serving.inference.decoder import ImageDecoder
from serving.inference.image_files import ImageFiles
from serving.inference.request import InferInput, RequestHandle
from serving.models.images import ImageTensor
from serving.protocol.tensors import DATATYPES, Elements

TENSOR = ImageTensor("images", (1, 2, 2), 64, Preprocessing())
WAIT_S = 30.0


class Held:
    """Decodes in place of Pillow: each image waits until the test lets it go on."""

    def __init__(self) -> None:
        self.began: queue.Queue[bytes] = queue.Queue()
        self.go_on = threading.Semaphore(0)

    def __call__(
        self,
        files: list[bytes],
        index: int,
        images: ImageTensor,
        room: Callable[[int, bool], AbstractContextManager[None]],
    ) -> Pixels:
        with room(4, True):
            self.began.put(files[index])
            assert self.go_on.acquire(timeout=WAIT_S)
            if files[index] == b"crash":
                raise ZeroDivisionError("no one expects this")
            return np.full(images.shape, files[index][0], np.uint8)


class Request:
    """Collects what becomes of a request's files; what they start is a `RequestHandle`."""

    def __init__(self) -> None:
        self.outcome: queue.Queue[Pixels | ServingError] = queue.Queue()
        self.is_cancelled = threading.Event()
        self.when_decoded: Callable[[], None] = lambda: None

    def then(self, pixels: Pixels) -> RequestHandle:
        self.when_decoded()
        self.outcome.put(pixels)
        return self

    def cancel(self) -> None:
        self.is_cancelled.set()

    def result(self) -> Pixels | ServingError:
        return self.outcome.get(timeout=WAIT_S)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held()
    monkeypatch.setattr(decoder_module, "decode_file", held)
    monkeypatch.setattr(decoder_module, "check_headers", lambda files: None)
    yield held
    held.go_on.release(100)


def submit(
    decoder: ImageDecoder, files: list[bytes], deadline: float | None = None, images: ImageTensor = TENSOR
) -> tuple[Request, RequestHandle]:
    request = Request()
    given = ImageFiles(InferInput("images", "BYTES", (len(files),), Elements(DATATYPES["BYTES"], files)), images)
    return request, decoder.submit(given, deadline, then=request.then, fail=request.outcome.put)


def png(value: int) -> bytes:
    content = io.BytesIO()
    Image.new("L", (5, 5), value).save(content, "PNG")
    return content.getvalue()


def test_pixels_are_in_the_order_of_the_files() -> None:
    decoder, began = ImageDecoder(3), time.monotonic()
    request, _ = submit(decoder, [png(value) for value in range(40)])
    pixels = request.result()
    assert isinstance(pixels, np.ndarray)
    np.testing.assert_array_equal(pixels[:, 0, 0, 0], np.arange(40))
    assert decoder.num_images == 40
    assert 0 < decoder.seconds < 3 * (time.monotonic() - began)


def test_a_file_that_is_decoded_again_without_its_damaged_metadata_counts_once() -> None:
    content = png(7)
    end = content.rindex(b"IEND") - 4
    text = b"zTXtlong\0\0" + zlib.compress(bytes(4 << 20))  # Pillow refuses it, after the pixels
    damaged = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    decoder = ImageDecoder(1)
    with pytest.warns(UserWarning, match="its metadata are damaged"):
        result = submit(decoder, [content[:end] + damaged + content[end:]])[0].result()
    assert isinstance(result, np.ndarray)
    assert decoder.num_images == 1


def test_a_small_request_does_not_wait_for_a_large_one(held: Held) -> None:
    decoder = ImageDecoder(1)
    large, _ = submit(decoder, [b"large"] * 20)
    assert held.began.get(timeout=WAIT_S) == b"large"
    small, _ = submit(decoder, [b"small"])
    held.go_on.release(4)
    assert isinstance(small.result(), np.ndarray)
    assert large.outcome.empty()
    held.go_on.release(20)
    assert isinstance(large.result(), np.ndarray)


def test_bytes_that_wait_are_bounded(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module, "MAX_WAITING_BYTES", 10)
    decoder = ImageDecoder(1)
    first, _ = submit(decoder, [b"a" * 11])
    with pytest.raises(ResourceExhausted, match="15 bytes of images wait to be decoded") as refused:
        submit(decoder, [b"b"])
    assert refused.value.retry_after_ms
    held.go_on.release()
    assert isinstance(first.result(), np.ndarray)
    held.go_on.release()
    assert isinstance(submit(decoder, [b"b"])[0].result(), np.ndarray)


def test_pixels_of_tiny_files_are_bounded_too(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module, "MAX_WAITING_BYTES", 10)
    decoder = ImageDecoder(1)
    three, _ = submit(decoder, [b"a", b"b", b"c"])
    with pytest.raises(ResourceExhausted, match="15 bytes of images wait to be decoded"):
        submit(decoder, [b"d"])
    held.go_on.release(3)
    assert isinstance(three.result(), np.ndarray)


def test_pixels_at_the_same_time_are_bounded(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module, "MAX_PIXELS_AT_ONCE", 9)  # two images of four, and no third
    decoder = ImageDecoder(4)
    request, _ = submit(decoder, [b"a", b"b", b"c", b"d"])
    assert {held.began.get(timeout=WAIT_S) for _ in range(2)} == {b"a", b"b"}
    with pytest.raises(queue.Empty):
        held.began.get(timeout=0.05)
    held.go_on.release(4)
    assert isinstance(request.result(), np.ndarray)


def test_all_threads_decode_the_files_of_one_request(held: Held) -> None:
    request, _ = submit(ImageDecoder(2), [b"a", b"b", b"c"])
    assert {held.began.get(timeout=WAIT_S) for _ in range(2)} == {b"a", b"b"}
    held.go_on.release(3)
    assert isinstance(request.result(), np.ndarray)


def test_a_deadline_that_passes(held: Held) -> None:
    decoder = ImageDecoder(1)
    request, _ = submit(decoder, [b"a"], deadline=time.monotonic() - 1)
    assert isinstance(request.result(), DeadlineExceeded)
    assert held.began.empty()


def test_a_request_that_is_cancelled_is_not_decoded_further(held: Held) -> None:
    decoder = ImageDecoder(1)
    request, handle = submit(decoder, [b"a", b"b"])
    assert held.began.get(timeout=WAIT_S) == b"a"
    handle.cancel()
    handle.cancel()
    held.go_on.release(2)
    other, _ = submit(decoder, [b"c"])
    assert isinstance(other.result(), np.ndarray)
    assert held.began.get(timeout=WAIT_S) == b"c"
    assert isinstance(request.result(), Cancelled)
    assert request.outcome.empty()


class Files(list[bytes]):
    """A list that can be referred to weakly."""


def test_a_request_that_is_cancelled_leaves_no_file_in_the_queue(held: Held) -> None:
    decoder = ImageDecoder(1)
    first, _ = submit(decoder, [b"first"])
    assert held.began.get(timeout=WAIT_S) == b"first"
    files = Files([b"a", b"b"])
    waiting, handle = submit(decoder, files)
    references = [weakref.ref(files), weakref.ref(waiting)]
    handle.cancel()
    del files, waiting, handle
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    held.go_on.release()
    assert isinstance(first.result(), np.ndarray)


def test_cancelling_reaches_what_was_started(held: Held) -> None:
    request, handle = submit(ImageDecoder(1), [b"a"])
    request.when_decoded = handle.cancel  # the handle does not have the request yet
    held.go_on.release()
    request.result()
    assert request.is_cancelled.wait(WAIT_S)
    request.is_cancelled.clear()
    handle.cancel()
    assert request.is_cancelled.is_set()


def test_a_decoder_that_crashes_fails_its_request_alone(held: Held) -> None:
    decoder = ImageDecoder(1)
    held.go_on.release(10)
    crashed, _ = submit(decoder, [b"a", b"crash", b"b"])
    assert isinstance(crashed.result(), Internal)
    assert isinstance(submit(decoder, [b"a"])[0].result(), np.ndarray)
    assert crashed.outcome.empty(), "one error alone"


def test_pixels_for_which_there_is_no_memory(held: Held) -> None:
    decoder = ImageDecoder(1)
    request, _ = submit(decoder, [b"x"], images=ImageTensor("images", (1 << 20,) * 3, 64, Preprocessing()))
    assert isinstance(request.result(), Internal)
    held.go_on.release()
    request, _ = submit(decoder, [b"y"])
    assert isinstance(request.result(), np.ndarray)
