"""System shared memory of clients: tensors that a request names by region, offset and size, in place of their bytes.

Triton's extension, with POSIX shared memory of this machine
(https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_shared_memory.md). Regions are read
and written as files, not mapped: a client that shrinks its region would end the process with SIGBUS, and one that
changes an input while it waits would change it for the cache and after its checks. Copying once costs the same as the
copy into the batch.
"""

import os
import stat
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from serving.errors import InvalidArgument, NotFound, ServingError, Unsupported, quote
from serving.inference.message_memory import MemoryShare
from serving.inference.request import InferInput, InferRequest, RequestedOutput, SharedRange
from serving.protocol.tensors import Buffer

FOLDER = Path("/dev/shm")
"""Where Linux has POSIX shared memory: one file for each object."""

MAX_REGIONS = 256
"""Each takes a file descriptor."""
_MAX_NAME = 256


class Region:
    """A registered part of a shared memory object. Closed once it is unregistered and no request needs it any more.

    Args:
        descriptor: of the open object, which this region closes.
    """

    def __init__(self, name: str, key: str, offset: int, num_bytes: int, descriptor: int) -> None:
        self.name = name
        self.key = key
        self.offset = offset
        self.num_bytes = num_bytes
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Returns bytes of the region.

        Raises:
            InvalidArgument: the client has made the object smaller.
        """
        parts: list[bytes] = []
        position, left = self.offset + offset, num_bytes
        while left:
            part = os.pread(self.descriptor, left, position)
            if not part:
                raise self._shrunk()
            parts.append(part)
            position, left = position + len(part), left - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, offset: int, data: Buffer) -> None:
        """Writes bytes into the region.

        Raises:
            InvalidArgument: the client has made the object smaller; writing would make it larger again.
        """
        view = memoryview(data)
        if os.fstat(self.descriptor).st_size < self.offset + offset + len(view):
            raise self._shrunk()
        written = 0
        while written < len(view):
            written += os.pwrite(self.descriptor, view[written:], self.offset + offset + written)

    def _shrunk(self) -> InvalidArgument:
        return InvalidArgument(f"shared memory region {quote(self.name)} has become smaller than it was")


@dataclass(frozen=True, slots=True)
class Place:
    """A range of a registered region, for an output; a `SharedPlace`."""

    region: Region
    range: SharedRange

    def write(self, output: str, data: Buffer) -> None:
        """Writes an output.

        Raises:
            InvalidArgument: it does not fit.
        """
        if len(data) > self.range.num_bytes:
            raise InvalidArgument(
                f"output '{output}' has {len(data)} bytes, more than the {self.range.num_bytes} bytes of its range of "
                f"shared memory region {quote(self.region.name)}"
            )
        try:
            self.region.write(self.range.offset, data)
        except OSError as error:
            raise InvalidArgument(f"output '{output}' cannot be written to its region: {error.strerror}") from error


class NeedsSharedMemory(Exception):
    """A request has tensors in shared memory, which must be read before it can run."""

    def __init__(self, request: InferRequest) -> None:
        super().__init__()
        self.request = request


class SharedMemory:
    """The regions that clients have registered. Thread-safe.

    Args:
        max_bytes: of all inputs of a request, as of a message.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._regions: dict[str, Region] = {}

    def register(self, name: str, key: str, offset: int, num_bytes: int) -> None:
        """Opens a region.

        Args:
            key: name of the POSIX object, with or without the slash at its beginning.

        Raises:
            InvalidArgument: the name is taken, or there is no such memory.
        """
        if not 0 < len(name) <= _MAX_NAME:
            raise InvalidArgument(f"the name of a region must have 1 to {_MAX_NAME} characters, got {len(name)}")
        descriptor = _open(key)
        region = Region(name, key, offset, num_bytes, descriptor)
        size = os.fstat(descriptor).st_size
        if offset < 0 or num_bytes < 1 or offset + num_bytes > size:
            raise InvalidArgument(
                f"shared memory region {quote(name)}: {num_bytes} bytes from {offset} are not inside the {size} bytes "
                f"of {quote(key)}"
            )
        with self._lock:
            if name in self._regions:
                raise InvalidArgument(f"shared memory region {quote(name)} is already registered: unregister it first")
            if len(self._regions) >= MAX_REGIONS:
                raise InvalidArgument(f"{MAX_REGIONS} shared memory regions are registered: unregister one first")
            self._regions[name] = region

    def unregister(self, name: str = "") -> None:
        """Forgets a region; all of them, if `name` is empty. Does nothing about one that is not registered."""
        with self._lock:
            if name:
                self._regions.pop(name, None)
            else:
                self._regions.clear()

    def regions(self, name: str = "") -> Sequence[Region]:
        """Returns a region; all of them, if `name` is empty.

        Raises:
            NotFound: it is not registered.
        """
        with self._lock:
            return [self._find(name)] if name else [self._regions[name] for name in sorted(self._regions)]

    def resolve(self, request: InferRequest, share: MemoryShare) -> InferRequest:
        """Returns a request with the inputs that it has in shared memory, and the places of its outputs.

        Args:
            share: of the memory of messages, in which the inputs count: they are copied.

        Raises:
            InvalidArgument: a range is not inside its region, an input has data as well, or the inputs are too large.
            NotFound: a region is not registered.
            ResourceExhausted: there is no memory for the inputs.
        """
        # Before any is read: a short request may name one region a thousand times.
        num_bytes = sum(self._check_input(given, given.shared) for given in request.inputs if given.shared is not None)
        if num_bytes > self._max_bytes:
            raise InvalidArgument(
                f"the inputs have {num_bytes} bytes in shared memory: at most {self._max_bytes} are accepted "
                "(--max-message-bytes)"
            )
        share.take(num_bytes)
        inputs = [given if given.shared is None else self._read(given, given.shared) for given in request.inputs]
        outputs = [
            output if output.shared is None else self._place(output, output.shared) for output in request.outputs
        ]
        return replace(request, inputs=inputs, outputs=outputs)

    def _check_input(self, given: InferInput, shared: SharedRange) -> int:
        """Checks an input. Returns its number of bytes."""
        if len(given.data):
            raise InvalidArgument(f"input {quote(given.name)} is in shared memory and has data: expected one of them")
        self._checked(f"input {quote(given.name)}", shared)
        num_bytes: int = shared.num_bytes
        return num_bytes

    def _read(self, given: InferInput, shared: SharedRange) -> InferInput:
        region = self._checked(f"input {quote(given.name)}", shared)
        return replace(given, data=region.read(shared.offset, shared.num_bytes))

    def _place(self, output: RequestedOutput, shared: SharedRange) -> RequestedOutput:
        return replace(output, place=Place(self._checked(f"output {quote(output.name)}", shared), shared))

    def _checked(self, what: str, shared: SharedRange) -> Region:
        """Returns the region of a range that is inside it."""
        if not isinstance(shared.region, str):
            raise InvalidArgument(f"{what}: shared_memory_region must be a string, got {quote(shared.region)}")
        for name, value in (("byte_size", shared.num_bytes), ("offset", shared.offset)):
            if type(value) is not int or value < 0:
                raise InvalidArgument(f"{what}: shared_memory_{name} must be a whole number, got {quote(value)}")
        with self._lock:
            region = self._find(shared.region)
        if shared.offset + shared.num_bytes > region.num_bytes:
            raise InvalidArgument(
                f"{what}: {shared.num_bytes} bytes from {shared.offset} are not inside the {region.num_bytes} bytes of "
                f"shared memory region {quote(region.name)}"
            )
        return region

    def _find(self, name: str) -> Region:
        region = self._regions.get(name)
        if region is None:
            raise NotFound(f"unable to find system shared memory region {quote(name)}: register it first")
        return region


def refusal(request: InferRequest) -> ServingError:
    """Returns the error for a request that needs shared memory, of a server that allows none."""
    for given in request.inputs:
        if given.shared is not None:
            return Unsupported(
                f"input {quote(given.name)} is in shared memory, which this server does not read without "
                "--allow-client-shm"
            )
    names = [output.name for output in request.outputs if output.shared is not None]
    return Unsupported(
        f"output {quote(names[0])} is requested in shared memory, which this server does not write without "
        "--allow-client-shm"
    )


def _open(key: str) -> int:
    name = key.removeprefix("/")
    if not name or "/" in name or "\0" in name or name in (".", "..") or len(name) > _MAX_NAME:
        raise InvalidArgument(f"key {quote(key)} is not the name of a shared memory object")
    try:
        descriptor = os.open(FOLDER / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidArgument(f"shared memory object {quote(key)} cannot be opened: {reason}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidArgument(f"{quote(key)} is not a shared memory object")
    return descriptor
