"""Sums of vectors over the ranks of one host, through memory that all of them map.

gloo sends a vector through the loopback device, which costs a millisecond for the lecture's net: a third of a step.
Here each rank writes its vector beside the others', adds up one slice of all of them, and reads the slices that the
others have added up. Additions follow one binary tree over the ranks, so that the bits are the same on every rank, and
those of ranks on several hosts that add up in pairs (`World.add_up`).

Knows nothing of torch.distributed. Linux only.
"""

import mmap
import os
import socket
import struct
import time
from typing import Self

import torch

ROOM = 1 << 20
"""Numbers (float32) of each rank that are added up at a time."""
MEET_S = 60.0
"""How long ranks that start together may miss each other."""


class HostSum:
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

    @classmethod
    def join(cls, name: str, rank: int, size: int) -> Self:
        """Meet the other ranks of this host.

        Args:
            name: of the round, the same for all and used once.

        Raises:
            ConnectionError: they do not come.
        """
        distances = [1 << power for power in range((size - 1).bit_length())]
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as meeting_place:
            address = f"\0convoy/{name}"  # abstract: no file that would be left
            meeting_place.settimeout(MEET_S)
            if rank == 0:
                meeting_place.bind(address)
                meeting_place.listen(size)
                descriptors = _hand_out(meeting_place, size, distances)
            else:
                _connect(meeting_place, address)
                meeting_place.send(struct.pack("i", rank))
                _, descriptors, _, _ = socket.recv_fds(meeting_place, 1, 1 + 2 * len(distances))
        if len(descriptors) != 1 + 2 * len(distances):
            raise ConnectionError("rank 0 left while the ranks of this host met")
        links = [socket.socket(fileno=descriptor) for descriptor in descriptors[1:]]
        shared = mmap.mmap(descriptors[0], 2 * size * ROOM * 4)
        os.close(descriptors[0])
        memory = torch.frombuffer(shared, dtype=torch.float32).view(2, size, ROOM)
        return cls(rank, memory, links[: len(distances)], links[len(distances) :])

    def close(self) -> None:
        """Leave; the others' next sum fails."""
        for link in (*self._out, *self._into):
            link.close()

    def add_up(self, sums: torch.Tensor, num_vectors: int) -> None:
        """Replace every rank's vector by the sum of those of the first ranks.

        Args:
            sums: float32 `[N]` on the CPU, of the same length on every rank.
            num_vectors: how many ranks' vectors count; the others' are overwritten all the same.

        Raises:
            ConnectionError: another rank is gone.
        """
        for part in sums.split(ROOM):
            self._add_up_part(part, num_vectors)

    def _add_up_part(self, part: torch.Tensor, num_vectors: int) -> None:
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
        for out, into in zip(self._out, self._into, strict=True):
            out.send(b"!")
            if not into.recv(1):
                raise ConnectionError("another rank of this host is gone")


def _hand_out(meeting_place: socket.socket, size: int, distances: list[int]) -> list[int]:
    """Make the memory and the links, give every other rank its descriptors; returns rank 0's."""
    memory = os.memfd_create("convoy-sums")
    os.ftruncate(memory, 2 * size * ROOM * 4)
    links = [[socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(size)] for _ in distances]

    def descriptors(rank: int) -> list[int]:
        out = [of_distance[rank][0].fileno() for of_distance in links]
        into = [
            of_distance[(rank - distance) % size][1].fileno()
            for distance, of_distance in zip(distances, links, strict=True)
        ]
        return [memory, *out, *into]

    for _ in range(size - 1):
        peer, _ = meeting_place.accept()
        with peer:
            _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if user != os.getuid():
                raise ConnectionError(f"user {user} came to where the ranks of this host meet")
            peer.settimeout(MEET_S)
            (rank,) = struct.unpack("i", peer.recv(4))
            socket.send_fds(peer, [b"!"], descriptors(rank))
    mine = [os.dup(descriptor) for descriptor in descriptors(0)]
    os.close(memory)
    for of_distance in links:
        for pair in of_distance:
            for end in pair:
                end.close()
    return mine


def _connect(meeting_place: socket.socket, address: str) -> None:
    """Connect, as soon as rank 0 is there."""
    until = time.monotonic() + MEET_S
    while True:
        try:
            return meeting_place.connect(address)
        except ConnectionRefusedError:
            if time.monotonic() > until:
                raise ConnectionError("rank 0 did not come to where the ranks of this host meet") from None
            time.sleep(0.005)
