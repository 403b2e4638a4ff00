"""Decodes the image files of requests on threads of its own: neither an event loop nor an instance waits for them.

Three bounds hold: on the bytes of the requests that wait, with the pixels that they become; on the pixels that are
decoded at the same time; and on the number of threads. Requests take turns: once an image is decoded, the next of its
request goes to the end of the queue.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from convoy.cpus import num_available_cpus
from convoy.images import Pixels
from convoy.threads import ThreadPool
from serving.errors import Cancelled, DeadlineExceeded, Internal, ResourceExhausted, ServingError
from serving.inference.image_files import ImageFiles, check_headers, decode_file
from serving.inference.request import RequestHandle

logger = logging.getLogger(__name__)

MAX_WAITING_BYTES = 256 << 20
"""Of the files that wait to be decoded, and of the pixels that the model gets in their place: a file of 70 bytes may
become 150 KB of them. One request may exceed it, so that every size is accepted."""
MAX_PIXELS_AT_ONCE = 1 << 26
"""That all threads decode at the same time, in about half a gigabyte. One image may have as many."""

_RETRY_AFTER_MS = 1000


class ImageDecoder:
    """A pool of threads for the image files of all models.

    Args:
        num_threads: None for one for each CPU that the process may use.

    Attributes:
        num_images: whose decoding has begun.
        seconds: that decoding took, summed over the threads.
    """

    def __init__(self, num_threads: int | None = None) -> None:
        self.num_images = 0
        self.seconds = 0.0
        self.num_threads = num_threads or num_available_cpus()
        self._executor = ThreadPool(self.num_threads, "decoder")
        self._changed = threading.Condition()
        self._num_bytes = 0
        self._num_pixels = 0

    def submit(
        self,
        files: ImageFiles,
        deadline: float | None,
        *,
        then: Callable[[Pixels], RequestHandle | None],
        fail: Callable[[ServingError], None],
    ) -> RequestHandle:
        """Queues the files of a request. Returns a handle that cancels them, or the request that `then` returns.

        Args:
            deadline: on the clock of `time.monotonic`; None for none.
            then: takes the pixels, [N, C, H, W], on one of the threads.
            fail: is called in place of `then` if an image cannot be used, or the request is cancelled.

        Raises:
            ResourceExhausted: too many bytes wait.
        """
        job = _Job(self, files, deadline, _Callbacks(then, fail))
        with self._changed:
            if self._num_bytes > MAX_WAITING_BYTES:
                raise ResourceExhausted(f"{self._num_bytes} bytes of images wait to be decoded", _RETRY_AFTER_MS)
            self._num_bytes += job.num_bytes
        self.run(job.start)
        return job

    def run(self, step: Callable[[], None]) -> None:
        """Runs a step when those before it have run."""
        self._executor.submit(step)

    def free(self, num_bytes: int) -> None:
        """Frees the bytes of a request that has been decoded, has failed or was cancelled."""
        with self._changed:
            self._num_bytes -= num_bytes

    @contextmanager
    def room(self, num_pixels: int, is_new: bool) -> Iterator[None]:
        """Waits until so many more pixels may be decoded, and measures how long that takes.

        Args:
            is_new: False for an image that is decoded once more, which counts once.
        """
        with self._changed:
            while self._num_pixels and self._num_pixels + num_pixels > MAX_PIXELS_AT_ONCE:
                self._changed.wait()
            self._num_pixels += num_pixels
        began = time.monotonic()
        try:
            yield
        finally:
            with self._changed:
                self.num_images += is_new
                self.seconds += time.monotonic() - began
                self._num_pixels -= num_pixels
                self._changed.notify_all()


class _Callbacks(NamedTuple):
    """What is called when the files of a request are decoded, or have failed: one of the two, once."""

    then: Callable[[Pixels], RequestHandle | None]
    fail: Callable[[ServingError], None]


class _Job:
    """The files of one request, and then the request with their pixels; a `RequestHandle`.

    A job that is over may stay in the pool's queue for seconds. It keeps nothing of its request.

    Attributes:
        num_bytes: of the files and of the pixels.
    """

    def __init__(self, pool: ImageDecoder, files: ImageFiles, deadline: float | None, callbacks: _Callbacks) -> None:
        self.num_bytes = files.num_bytes + files.num_files * math.prod(files.images.shape)
        self._pool = pool
        self._given: ImageFiles | None = files
        self._files: list[bytes] = []
        self._images = files.images
        self._deadline = deadline
        self._callbacks: _Callbacks | None = callbacks  # None once it is decoded, failed or cancelled
        self._lock = threading.Lock()
        self._is_cancelled = False
        self._request: RequestHandle | None = None
        self._pixels: Pixels = np.empty(0, np.uint8)
        self._next = 0
        self._num_left = 0

    def start(self) -> None:
        """Begins to decode the files, on this thread and others; before that, reads the headers of several files."""
        given = self._given
        if given is None:
            return
        try:
            files = given.split()
            if len(files) > 1:
                check_headers(files)
            pixels = np.empty((len(files), *self._images.shape), np.uint8)
        except BaseException as error:
            self._end(error)
            return
        with self._lock:
            if self._callbacks is None:
                return
            self._files, self._pixels, self._num_left = files, pixels, len(files)
        for _ in range(min(len(files), self._pool.num_threads) - 1):
            self._pool.run(self._decode_next)
        self._decode_next()

    def _decode_next(self) -> None:
        with self._lock:
            index = self._next
            if self._callbacks is None or index == len(self._files):
                return
            self._next += 1
            files, pixels = self._files, self._pixels
        try:
            if self._deadline is not None and time.monotonic() >= self._deadline:
                raise DeadlineExceeded("too late: the request's deadline passed while its images were decoded")
            pixels[index] = decode_file(files, index, self._images, self._pool.room)
        except BaseException as error:  # a thread of the pool must go on, whatever a decoder raises
            self._end(error)
            return
        with self._lock:
            self._num_left -= 1
            is_last = self._num_left == 0
        if is_last:
            self._finish(pixels)
        else:
            self._pool.run(self._decode_next)

    def _finish(self, pixels: Pixels) -> None:
        if (callbacks := self._close()) is not None:
            self._request = callbacks.then(pixels)
            if self._is_cancelled:  # `cancel` may have run before `_request` was set
                self.cancel()

    def _end(self, error: BaseException) -> None:
        if not isinstance(error, ServingError):
            logger.error("images could not be decoded", exc_info=error)
            error = Internal("the images could not be decoded; the server's log says why")
        if (callbacks := self._close()) is not None:
            callbacks.fail(error)

    def _close(self) -> _Callbacks | None:
        """Forgets the request. Returns its callbacks; None if that was done before."""
        with self._lock:
            callbacks, self._callbacks = self._callbacks, None
            if callbacks is None:
                return None
            self._given, self._files, self._pixels = None, [], np.empty(0, np.uint8)
        self._pool.free(self.num_bytes)
        return callbacks

    def cancel(self) -> None:
        """Drops the request. If that is before it was queued for its model, it fails, so that it is counted."""
        self._is_cancelled = True
        if (callbacks := self._close()) is not None:
            callbacks.fail(Cancelled("the request was cancelled while its images were decoded"))
        if self._request is not None:
            self._request.cancel()
