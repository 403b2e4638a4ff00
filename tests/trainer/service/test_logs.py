"""Logs are read in pieces of any length, so that a line of any length costs no more memory than a short one."""

from pathlib import Path

import pytest

from trainer.service import log_limit, logs
from trainer.service.logs import Position

CONTENT = b"of torchrun\n[rank 0] a\n[rank 1] b\n\n[rank 0] " + b"long " * 20 + b"\r[rank 0] no line\n[ra\n[rank 0] end"
LINES = CONTENT.split(b"\n")
RANK = b"[rank 0] "


def read(path: Path, num_lines: int | None = None, prefix: bytes = b"") -> bytes:
    start = 0 if num_lines is None else logs.tail(path, num_lines, prefix)
    return b"".join(chunk.content for chunk in logs.read(path, Position(1, start), prefix))


def rest_after_each_chunk(path: Path, prefix: bytes) -> set[bytes]:
    """Returns the log as readers have it who lost the connection behind a chunk and went on from there."""
    chunks = list(logs.read(path, Position(1, 0), prefix))
    found = set()
    for number in range(1, len(chunks)):
        before = b"".join(chunk.content for chunk in chunks[:number])
        rest = logs.read(path, chunks[number - 1].end, prefix)
        found.add(before + b"".join(chunk.content for chunk in rest))
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 10, 50, 1000])
def test_the_end_and_the_lines_of_a_rank_do_not_depend_on_the_pieces(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_CHUNK_BYTES", size)
    path = tmp_path / "log"
    for end in (b"", b"\n"):
        path.write_bytes(CONTENT + end)
        of_rank = [line.removeprefix(RANK) for line in LINES if line.startswith(RANK)]
        assert read(path, None, RANK) == b"\n".join(of_rank) + b"\n"
        for number in range(len(LINES) + 2):
            expected = b"\n".join(LINES[max(0, len(LINES) - number) :]) + end if number else b""
            assert read(path, number) == expected
        for prefix in (b"", RANK):
            assert rest_after_each_chunk(path, prefix) == {read(path, None, prefix)}
        if size > len(RANK):
            assert read(path, 1, RANK) == of_rank[-1] + b"\n"


def test_a_long_log_keeps_its_begin_and_its_end_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FIRST_BYTES", "LAST_BYTES", "PART_BYTES"):
        monkeypatch.setattr(log_limit, name, 64 * 1024)
    monkeypatch.setattr(logs, "_CHUNK_BYTES", 4000)
    path = tmp_path / "log"
    lines = [b"[rank %d] line %d\n" % (number % 2, number) for number in range(100_000)]
    with path.open("ab", buffering=0) as file:
        for start in range(0, len(lines), 1000):  # as a job does while the log is bounded
            file.write(b"".join(lines[start : start + 1000]))
            log_limit.limit(path)
    blocks_of_parts = path.stat().st_size // 16
    assert path.stat().st_blocks * 512 < 200 * 1024 + blocks_of_parts < path.stat().st_size / 3
    everything = read(path)
    begin, note, end = everything.partition(b"\n[log] ")
    text, _, end = end.partition(b"\n")
    whole = b"".join(lines)
    missing = int(text.split()[0])
    assert whole.startswith(begin)
    assert whole.endswith(end)
    assert (note != b"", len(begin) + missing + len(end)) == (True, len(whole))
    assert read(path, 10) == b"".join(lines[-10:])
    assert read(path, 5, RANK) == b"".join(line.removeprefix(RANK) for line in lines[-10::2])
    assert read(path, 10**6) == everything
    of_rank = read(path, None, RANK)
    assert b"\n[log] " + text + b"\n" in of_rank
    assert of_rank.count(b"[rank") == 0
    for prefix in (b"", RANK):
        assert rest_after_each_chunk(path, prefix) == {read(path, None, prefix)}
    from_within = logs.read(path, Position(1, len(whole) // 2))  # of a reader that was too slow
    assert b"".join(chunk.content for chunk in from_within) == note + text + b"\n" + end
