"""Shared memory of clients: what can be registered, and that no range leads out of it."""

import os
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory as Block
from pathlib import Path

import pytest

from serving.errors import InvalidArgument, NotFound, Unsupported
from serving.inference import shared_memory
from serving.inference.message_memory import MemoryShare, MessageMemory
from serving.inference.request import InferInput, InferRequest, RequestedOutput, SharedRange
from serving.inference.shared_memory import SharedMemory, refusal

SIZE = 4096


@pytest.fixture
def block() -> Iterator[Block]:
    made = Block(create=True, size=SIZE)
    made.buf[:8] = b"01234567"
    yield made
    made.close()
    made.unlink()


@pytest.fixture
def memory(block: Block) -> SharedMemory:
    """With a region of bytes 2 to 8."""
    made = SharedMemory(max_bytes=5)
    made.register("r", f"/{block.name}", 2, 6)
    return made


def resolve(memory: SharedMemory, request: InferRequest) -> InferRequest:
    return memory.resolve(request, MemoryShare(MessageMemory()))


def asking(*, given: SharedRange | None = None, wanted: SharedRange | None = None, data: bytes = b"") -> InferRequest:
    inputs = [InferInput("x", "UINT8", (1,), data, given)]
    return InferRequest("m", inputs, outputs=[RequestedOutput("y", shared=wanted)], uses_shared_memory=True)


def test_an_input_is_read_and_an_output_written_at_its_offset(memory: SharedMemory, block: Block) -> None:
    resolved = resolve(memory, asking(given=SharedRange("r", 1, 3), wanted=SharedRange("r", 2, 4)))
    assert resolved.inputs[0].data == b"345"
    place = resolved.outputs[0].place
    assert place is not None
    place.write("y", b"AB")
    assert bytes(block.buf[:8]) == b"0123AB67"
    with pytest.raises(InvalidArgument, match="output 'y' has 5 bytes, more than the 4 bytes of its range"):
        place.write("y", b"ABCDE")
    assert bytes(block.buf[:8]) == b"0123AB67"


def test_a_region_may_be_the_whole_object_and_an_output_the_whole_region(memory: SharedMemory, block: Block) -> None:
    memory.unregister("r")
    memory.register("r", block.name, 0, SIZE)
    place = resolve(memory, asking(wanted=SharedRange("r", 0, SIZE))).outputs[0].place
    assert place is not None
    place.write("y", b"A" * SIZE)
    assert bytes(block.buf[:SIZE]) == b"A" * SIZE


@pytest.mark.parametrize(
    ("shared", "reason"),
    [
        (SharedRange("r", 4, 3), "input 'x': 3 bytes from 4 are not inside the 6 bytes"),
        (SharedRange("r", 2**63, 1), "are not inside"),
        (SharedRange("r", -1, 1), "shared_memory_offset must be a whole number, got -1"),
        (SharedRange("r", 0, -1), "shared_memory_byte_size must be a whole number, got -1"),
        (SharedRange("r", True, 1), "shared_memory_offset must be"),
        (SharedRange("r", 0, 1.5), "shared_memory_byte_size must be"),
        (SharedRange(7, 0, 1), "shared_memory_region must be a string, got 7"),
        (SharedRange("r", 0, 6), "at most 5 are accepted"),
    ],
)
def test_ranges_outside_a_region_are_refused(memory: SharedMemory, shared: SharedRange, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=reason):
        resolve(memory, asking(given=shared))
    if "accepted" not in reason:
        with pytest.raises(InvalidArgument, match=reason.replace("input 'x'", "output 'y'")):
            resolve(memory, asking(wanted=shared))


def test_all_inputs_together_are_bounded_before_one_is_read(
    memory: SharedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request of 10 KB that named a region of 60 MB a hundred times took 6 GB."""
    request = asking(given=SharedRange("r", 0, 3))
    read: list[str] = []
    monkeypatch.setattr(shared_memory.Region, "read", lambda region, offset, num_bytes: read.append(region.name))
    request.inputs *= 2
    with pytest.raises(InvalidArgument, match="the inputs have 6 bytes in shared memory: at most 5 are accepted"):
        resolve(memory, request)
    assert read == []


def test_a_region_that_is_not_registered(memory: SharedMemory) -> None:
    for request in (asking(given=SharedRange("q", 0, 1)), asking(wanted=SharedRange("q", 0, 1))):
        with pytest.raises(NotFound, match="unable to find system shared memory region 'q'"):
            resolve(memory, request)
    with pytest.raises(NotFound):
        memory.regions("q")
    memory.unregister("q")


def test_data_beside_shared_memory_contradict_it(memory: SharedMemory) -> None:
    with pytest.raises(InvalidArgument, match="input 'x' is in shared memory and has data"):
        resolve(memory, asking(given=SharedRange("r", 0, 1), data=b"1"))


@pytest.mark.parametrize(
    ("key", "offset", "num_bytes", "reason"),
    [
        ("", 0, 1, "not the name of a shared memory object"),
        ("/", 0, 1, "not the name"),
        ("../etc/passwd", 0, 1, "not the name"),
        ("..", 0, 1, "not the name"),
        ("a\0b", 0, 1, "not the name"),
        ("no-such-object", 0, 1, "cannot be opened: No such file"),
        (None, 0, SIZE + 1, "4097 bytes from 0 are not inside the 4096 bytes"),
        (None, SIZE, 1, "1 bytes from 4096 are not inside"),
        (None, 2**63, 2**63, "are not inside"),
        (None, 0, 0, "0 bytes from 0 are not inside"),
    ],
)
def test_memory_that_is_not_there_is_not_registered(
    memory: SharedMemory, block: Block, key: str | None, offset: int, num_bytes: int, reason: str
) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(InvalidArgument, match=reason):
        memory.register("s", block.name if key is None else key, offset, num_bytes)
    assert [region.name for region in memory.regions()] == ["r"]
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_links_folders_and_pipes_are_no_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    memory = SharedMemory(10)
    memory.register("file", "file", 0, 1)
    for name in ("link", "folder", "pipe"):
        with pytest.raises(InvalidArgument):
            memory.register(name, name, 0, 1)


def test_names_are_unique_and_bounded(memory: SharedMemory, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgument, match="'r' is already registered"):
        memory.register("r", block.name, 0, 1)
    for name in ("", "n" * 257):
        with pytest.raises(InvalidArgument, match="must have 1 to 256 characters"):
            memory.register(name, block.name, 0, 1)
    monkeypatch.setattr(shared_memory, "MAX_REGIONS", 1)
    with pytest.raises(InvalidArgument, match="1 shared memory regions are registered"):
        memory.register("s", block.name, 0, 1)


def test_a_region_is_closed_once_no_request_needs_it(memory: SharedMemory, block: Block) -> None:
    place = resolve(memory, asking(wanted=SharedRange("r", 0, 1))).outputs[0].place
    assert place is not None
    descriptor = memory.regions()[0].descriptor
    memory.unregister()
    place.write("y", b"A")
    assert block.buf[2] == ord("A")
    del place
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_region_that_its_client_shrinks_is_an_error_of_the_request(memory: SharedMemory, block: Block) -> None:
    place = resolve(memory, asking(wanted=SharedRange("r", 1, 5))).outputs[0].place
    assert place is not None
    os.truncate(f"/dev/shm/{block.name}", 7)
    with pytest.raises(InvalidArgument, match="region 'r' has become smaller than it was"):
        resolve(memory, asking(given=SharedRange("r", 1, 5)))
    with pytest.raises(InvalidArgument, match="region 'r' has become smaller than it was"):
        place.write("y", b"12345")
    assert os.stat(f"/dev/shm/{block.name}").st_size == 7


def test_a_server_that_allows_none_says_so() -> None:
    for request, what in (
        (asking(given=SharedRange("r", 0, 1)), "input 'x'"),
        (asking(wanted=SharedRange("r", 0, 1)), "output 'y'"),
    ):
        error = refusal(request)
        assert isinstance(error, Unsupported)
        assert str(error).startswith(what)
