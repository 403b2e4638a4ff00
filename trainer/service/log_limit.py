"""Bounds logs that other processes write: `python -I -S log_limit.py FOLDER`, or `limit` now and then.

A log keeps its first and its last bytes. What lies between is freed on the disk, and reads as zeros: so the positions
of what is left stay the same, and nobody who writes or follows the log needs to know. A note in the log tells how much
is missing. The file system must be able to free a part of a file, as ext4, XFS, Btrfs, tmpfs and NFS 4.2 are.

Of each part that is freed its first block stays, which ends the line: torchrun passes the files of its ranks on line by
line, and would hold all zeros as one in memory, where ranks print faster than it reads.

It imports the standard library only, as a job's runner and a batch script use it.
"""

import ctypes
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

FIRST_BYTES = 16 * 2**20
LAST_BYTES = 32 * 2**20
PART_BYTES = 16 * 2**20
"""So much is freed at a time."""
EVERY_S = 1.0
MARK = b"[log] "
"""The begin of a note's line."""
_BLOCK_BYTES = 4096
_NOTE = re.compile(rb"\n\[log\] (\d+) bytes [^\n\0]*\n")
_PUNCH_HOLE = 0x01 | 0x02
"""Of fallocate(2): frees a range of a file, whose size stays."""


def limit_all(folder: Path) -> None:
    """Bounds the log of an attempt, and torchrun's files of its ranks."""
    for path in (folder / "log", *folder.glob("ranks/**/*.log")):
        limit(path)


def limit(path: Path) -> None:
    """Frees what lies between the first and the last bytes of a file. Does nothing where that cannot be done."""
    with suppress(OSError, AttributeError), path.open("r+b", buffering=0) as file:  # no fallocate: not Linux
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        found = read_note(descriptor)
        start = stop = found[1] if found else FIRST_BYTES
        fallocate = ctypes.CDLL(None).fallocate
        while size - stop >= PART_BYTES + LAST_BYTES:
            length = ctypes.c_int64(PART_BYTES - _BLOCK_BYTES)
            if fallocate(descriptor, _PUNCH_HOLE, ctypes.c_int64(stop + _BLOCK_BYTES), length) != 0:
                return
            stop += PART_BYTES
        if stop > start:
            kept = f"its first {FIRST_BYTES >> 20} MiB and its last {LAST_BYTES >> 20} MiB"
            note = f"\n[log] {stop - FIRST_BYTES} bytes are missing here: a log keeps {kept}\n"
            os.pwrite(descriptor, note.encode().ljust(_BLOCK_BYTES, b"\0"), FIRST_BYTES)


def read_note(descriptor: int) -> tuple[bytes, int] | None:
    """Returns the note of a log, and the position at which the log goes on behind it; None if nothing is missing."""
    found = _NOTE.match(os.pread(descriptor, _BLOCK_BYTES, FIRST_BYTES))
    return None if found is None else (found[0], FIRST_BYTES + int(found[1]))


if __name__ == "__main__":
    while True:
        limit_all(Path(sys.argv[1]))
        time.sleep(EVERY_S)
