"""Sums of vectors over the ranks of one host, through memory that all of them map.

gloo sends a vector through the loopback device, which costs a millisecond for the lecture's net: a third of a step.
Here each rank writes its vector beside the others', adds up one slice of all of them, and reads the slices that the
others have added up. Additions follow one binary tree over the ranks, so that the bits are the same on every rank, and
those of ranks on several hosts that add up in pairs (`World.all_reduce`).

Knows nothing of torch.distributed. Linux only.
"""

import mmap
import os
import socket
import struct
import time
from contextlib import ExitStack
from typing import Self

import torch

ROOM = 1 << 20
"""Numbers (float32) of each rank that are added up at a time."""
MEET_S = 60.0
"""How long ranks that start together may miss each other."""
GREET_S = 5.0
"""How long who comes to where they meet may say nothing."""


class SharedMemoryReducer:
    """One rank's part of the sums.

    Args:
        memory: float32 `[2, ranks, ROOM]`, shared. The two halves take turns: who writes into one again knows that all
            have left it, because all have met in the other since.
        out: sockets to the ranks 1, 2, 4, … places further on, by whom this one is heard.
        into: sockets from those so many places before.
    """

    def __init__(self, rank: int, memory: torch.Tensor, out: list[socket.socket], into: list[socket.socket]) -> None:
        self._rank = rank
        self._memory = memory
        self._out = out
        self._into = into
        self._turn = 0
        self.stop_requested = False
        """Told to all ranks with the next sum: one bit more on a way that is gone anyway."""
        self.stop_agreed = False
        """Whether any rank had a wish at the last sum; the same on all ranks."""

    @classmethod
    def join(cls, name: str, rank: int, size: int) -> Self:
        """Meet the other ranks of this host.

        Args:
            name: of the round, the same for all and used once.

        Raises:
            ConnectionError: they do not come.
        """
        try:
            descriptors = _meet_others(f"\0convoy/{name}", rank, size)  # abstract: no file that would be left
        except OSError as error:
            raise ConnectionError(f"the ranks of this host did not meet: {error}") from error
        links = [socket.socket(fileno=descriptor) for descriptor in descriptors[1:]]
        shared = mmap.mmap(descriptors[0], 2 * size * ROOM * 4)
        os.close(descriptors[0])
        memory = torch.frombuffer(shared, dtype=torch.float32).view(2, size, ROOM)
        return cls(rank, memory, links[: len(links) // 2], links[len(links) // 2 :])

    def close(self) -> None:
        """Leave; the others' next sum fails."""
        for link in (*self._out, *self._into):
            link.close()

    def all_reduce(self, sums: torch.Tensor, num_vectors: int) -> None:
        """Replace every rank's vector by the sum of those of the first ranks.

        Args:
            sums: float32 `[N]` on the CPU, of the same length on every rank.
            num_vectors: how many ranks' vectors count; the others' are overwritten all the same.

        Raises:
            ConnectionError: another rank is gone.
        """
        for part in sums.split(ROOM):
            self._all_reduce_part(part, num_vectors)

    def _all_reduce_part(self, part: torch.Tensor, num_vectors: int) -> None:
        vectors = self._memory[self._turn, :, : len(part)]
        self._turn = 1 - self._turn
        if self._rank < num_vectors:
            vectors[self._rank].copy_(part)
        self._meet()
        size = len(vectors)
        slices = vectors[:, self._rank * len(part) // size : (self._rank + 1) * len(part) // size]
        distance = 1
        while distance < num_vectors:
            for left in range(0, num_vectors - distance, 2 * distance):
                slices[left].add_(slices[left + distance])
            distance *= 2
        self._meet()
        part.copy_(vectors[0])

    def _meet(self) -> None:
        """Return when every rank has come here: after the last round, each has heard of all (dissemination barrier:
        Hensgen, Finkel, Manber 1988). The system calls order what was written before and what is read after.
        """
        heard = self.stop_requested
        for out, into in zip(self._out, self._into, strict=True):
            out.send(b"\1" if heard else b"\0")
            token = into.recv(1)
            if not token:
                raise ConnectionError("another rank of this host is gone")
            heard = heard or token == b"\1"
        self.stop_agreed = heard


def _meet_others(address: str, rank: int, size: int) -> list[int]:
    """This rank's descriptors: of the memory, of its links out, of its links in.

    Raises:
        OSError: the others do not come.
    """
    distances = [1 << power for power in range((size - 1).bit_length())]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as meeting_place:
        if rank == 0:
            meeting_place.bind(address)
            meeting_place.listen(size)
            with ExitStack() as opened:
                return _distribute_descriptors(_welcome(meeting_place, size, opened), size, distances, opened)
        meeting_place.settimeout(MEET_S)
        _connect(meeting_place, address)
        meeting_place.send(struct.pack("i", rank))
        _, descriptors, _, _ = socket.recv_fds(meeting_place, 1, 1 + 2 * len(distances))
    if len(descriptors) != 1 + 2 * len(distances):
        raise ConnectionError("rank 0 left")
    return descriptors


def _welcome(meeting_place: socket.socket, size: int, opened: ExitStack) -> dict[int, socket.socket]:
    """Connections to the other ranks. Strangers are turned away: anybody may try an address without a file."""
    peers: dict[int, socket.socket] = {}
    until = time.monotonic() + MEET_S
    while len(peers) < size - 1:
        meeting_place.settimeout(max(0.001, until - time.monotonic()))
        peer = opened.enter_context(meeting_place.accept()[0])
        rank = _rank_of(peer)
        if rank is not None and 0 < rank < size and rank not in peers:
            peers[rank] = peer
        else:
            peer.close()
    return peers


def _rank_of(peer: socket.socket) -> int | None:
    """The rank that is at the other end of a connection; None for somebody else."""
    _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if user != os.getuid():
        return None
    peer.settimeout(GREET_S)
    try:
        said = peer.recv(5)
    except OSError:
        return None
    return int(struct.unpack("i", said)[0]) if len(said) == 4 else None


def _distribute_descriptors(
    peers: dict[int, socket.socket], size: int, distances: list[int], opened: ExitStack
) -> list[int]:
    """Make the memory and the links, give every other rank its descriptors; returns rank 0's.

    In the order of the ranks, no more than some 2 · size ends are open at a time: those whose other end is given away.
    """
    memory = os.memfd_create("convoy-sums")
    opened.callback(os.close, memory)
    os.ftruncate(memory, 2 * size * ROOM * 4)
    ends: dict[tuple[int, int], socket.socket] = {}

    def end_of(sender: int, distance: int) -> socket.socket:
        """An end of a link; the first who asks makes the link."""
        link = (sender % size, distance)
        if link in ends:
            return ends.pop(link)
        mine, ends[link] = map(opened.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM))
        return mine

    def links_of(rank: int) -> list[socket.socket]:
        out = [end_of(rank, distance) for distance in distances]
        return [*out, *(end_of(rank - distance, distance) for distance in distances)]

    mine = links_of(0)
    for rank in range(1, size):
        links = links_of(rank)
        socket.send_fds(peers[rank], [b"!"], [memory, *(link.fileno() for link in links)])
        for connection in (peers[rank], *links):
            connection.close()
    return [os.dup(memory), *(link.detach() for link in mine)]


def _connect(meeting_place: socket.socket, address: str) -> None:
    """Connect, as soon as rank 0 is there."""
    until = time.monotonic() + MEET_S
    while True:
        try:
            return meeting_place.connect(address)
        except ConnectionRefusedError:
            if time.monotonic() > until:
                raise ConnectionError("rank 0 did not come") from None
            time.sleep(0.005)
