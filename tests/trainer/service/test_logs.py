"""Logs are read in pieces of any length, so that a line of any length costs no more memory than a short one."""

from pathlib import Path

import pytest

from trainer.service import logs

CONTENT = b"of torchrun\n[rank 0] a\n[rank 1] b\n\n[rank 0] " + b"long " * 20 + b"\r[rank 0] no line\n[ra\n[rank 0] end"
LINES = CONTENT.split(b"\n")
RANK = b"[rank 0] "


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 10, 50, 1000])
def test_the_end_and_the_lines_of_a_rank_do_not_depend_on_the_pieces(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_CHUNK_BYTES", size)
    path = tmp_path / "log"
    for end in (b"", b"\n"):
        path.write_bytes(CONTENT + end)
        of_rank = [line.removeprefix(RANK) for line in LINES if line.startswith(RANK)]
        assert b"".join(logs.read(path, None, RANK)) == b"\n".join(of_rank) + b"\n"
        for number in range(len(LINES) + 2):
            expected = b"\n".join(LINES[max(0, len(LINES) - number) :]) + end if number else b""
            assert b"".join(logs.read(path, number)) == expected
        if size > len(RANK):
            assert b"".join(logs.read(path, 1, RANK)) == of_rank[-1] + b"\n"
