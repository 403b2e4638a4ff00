"""Sums of vectors over the ranks of one host, through memory that all of them map.

gloo sends a vector through the loopback device, which costs a millisecond for the lecture's net: a third of a step.
Here each rank writes its vector into the shared memory, adds up one slice of all vectors, and reads the slices that
the others have added up. Additions follow one binary tree over the ranks, so that the bits are the same on every rank,
and equal to those of ranks on several hosts that add up in pairs (`World.all_reduce`).

Does not use torch.distributed. Linux only.
"""

import mmap
import os
import socket
import struct
import time
from contextlib import ExitStack
from typing import Self

import torch

CHUNK_SIZE = 1 << 20
"""Numbers (float32) of each rank that are added up at a time."""
CONNECT_TIMEOUT_S = 60.0
"""Longest wait of a rank for the other ranks of its host to connect."""
HANDSHAKE_TIMEOUT_S = 5.0
"""Longest wait for a process that has connected to send its rank."""


class SharedMemoryReducer:
    """One rank's part of the sums.

    Args:
        memory: float32 `[2, ranks, CHUNK_SIZE]`, shared. The two halves take turns: between two
            writes into the same half a rank passes a barrier, before which all ranks have read the first.
        outgoing: sockets to the ranks 1, 2, 4, … positions after this one.
        incoming: sockets from the ranks as many positions before it.
    """

    def __init__(
        self, rank: int, memory: torch.Tensor, outgoing: list[socket.socket], incoming: list[socket.socket]
    ) -> None:
        self._rank = rank
        self._memory = memory
        self._outgoing = outgoing
        self._incoming = incoming
        self._half = 0
        self.stop_requested = False
        """The stop flag of this rank, sent along with the next sum's barrier tokens."""
        self.stop_agreed = False
        """True if any rank had set its stop flag at the last sum; the same on all ranks."""

    @classmethod
    def join(cls, name: str, rank: int, size: int) -> Self:
        """Connects to the other ranks of this host.

        Args:
            name: the same for all ranks of a round, and never used again.

        Raises:
            ConnectionError: a rank does not connect in time.
        """
        try:
            descriptors = _receive_descriptors(f"\0convoy/{name}", rank, size)  # abstract: leaves no file behind
        except OSError as error:
            raise ConnectionError(f"the ranks of this host could not connect to each other: {error}") from error
        sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors[1:]]
        shared = mmap.mmap(descriptors[0], 2 * size * CHUNK_SIZE * 4)
        os.close(descriptors[0])
        memory = torch.frombuffer(shared, dtype=torch.float32).view(2, size, CHUNK_SIZE)
        return cls(rank, memory, sockets[: len(sockets) // 2], sockets[len(sockets) // 2 :])

    def close(self) -> None:
        """Disconnects; the others' next sum fails."""
        for connection in (*self._outgoing, *self._incoming):
            connection.close()

    def all_reduce(self, sums: torch.Tensor, num_vectors: int) -> None:
        """Replaces every rank's vector by the sum of the vectors of the first ranks.

        Args:
            sums: float32 `[N]` on the CPU, of the same length on every rank.
            num_vectors: number of ranks whose vectors are added up; the other ranks' vectors are only overwritten.

        Raises:
            ConnectionError: another rank is gone.
        """
        for chunk in sums.split(CHUNK_SIZE):
            self._all_reduce_chunk(chunk, num_vectors)

    def _all_reduce_chunk(self, chunk: torch.Tensor, num_vectors: int) -> None:
        vectors = self._memory[self._half, :, : len(chunk)]
        self._half = 1 - self._half
        if self._rank < num_vectors:
            vectors[self._rank].copy_(chunk)
        self._barrier()
        size = len(vectors)
        slices = vectors[:, self._rank * len(chunk) // size : (self._rank + 1) * len(chunk) // size]
        distance = 1
        while distance < num_vectors:
            for left in range(0, num_vectors - distance, 2 * distance):
                slices[left].add_(slices[left + distance])
            distance *= 2
        self._barrier()
        chunk.copy_(vectors[0])

    def _barrier(self) -> None:
        """Returns when every rank has called this: a dissemination barrier (Hensgen, Finkel, Manber 1988).

        Each token also carries the stop flag. The system calls order the memory accesses before and after the barrier.
        """
        stop = self.stop_requested
        for outgoing, incoming in zip(self._outgoing, self._incoming, strict=True):
            outgoing.send(b"\1" if stop else b"\0")
            token = incoming.recv(1)
            if not token:
                raise ConnectionError("another rank of this host is gone")
            stop = stop or token == b"\1"
        self.stop_agreed = stop


def _receive_descriptors(address: str, rank: int, size: int) -> list[int]:
    """Returns the descriptors of the memory, of this rank's outgoing sockets, and of its incoming sockets.

    Rank 0 listens at the address, creates all descriptors and sends every other rank its own.

    Raises:
        OSError: a rank does not connect in time.
    """
    distances = [1 << power for power in range((size - 1).bit_length())]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as endpoint:
        if rank == 0:
            endpoint.bind(address)
            endpoint.listen(size)
            with ExitStack() as stack:
                return _distribute_descriptors(_accept_ranks(endpoint, size, stack), size, distances, stack)
        endpoint.settimeout(CONNECT_TIMEOUT_S)
        _connect(endpoint, address)
        endpoint.send(struct.pack("i", rank))
        _, descriptors, _, _ = socket.recv_fds(endpoint, 1, 1 + 2 * len(distances))
    if len(descriptors) != 1 + 2 * len(distances):
        raise ConnectionError("rank 0 is gone")
    return descriptors


def _accept_ranks(listener: socket.socket, size: int, stack: ExitStack) -> dict[int, socket.socket]:
    """Returns connections to the other ranks. Rejects other processes: any may connect to an abstract address."""
    connections: dict[int, socket.socket] = {}
    until = time.monotonic() + CONNECT_TIMEOUT_S
    while len(connections) < size - 1:
        listener.settimeout(max(0.001, until - time.monotonic()))
        connection = stack.enter_context(listener.accept()[0])
        rank = _receive_rank(connection)
        if rank is not None and 0 < rank < size and rank not in connections:
            connections[rank] = connection
        else:
            connection.close()
    return connections


def _receive_rank(connection: socket.socket) -> int | None:
    """Returns the rank at the other end of a connection; None if it is another user's process, or not a rank."""
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if user != os.getuid():
        return None
    connection.settimeout(HANDSHAKE_TIMEOUT_S)
    try:
        message = connection.recv(5)
    except OSError:
        return None
    return int(struct.unpack("i", message)[0]) if len(message) == 4 else None


def _distribute_descriptors(
    connections: dict[int, socket.socket], size: int, distances: list[int], stack: ExitStack
) -> list[int]:
    """Creates the memory and the sockets, sends every other rank its descriptors, and returns rank 0's.

    Rank by rank: at most about 2 · size descriptors are open at a time, those whose other end has been sent.
    """
    memory = os.memfd_create("convoy-sums")
    stack.callback(os.close, memory)
    os.ftruncate(memory, 2 * size * CHUNK_SIZE * 4)
    other_ends: dict[tuple[int, int], socket.socket] = {}

    def end_of(sender: int, distance: int) -> socket.socket:
        """Returns an end of a rank's outgoing connection: first one end, then the other."""
        key = (sender % size, distance)
        if key in other_ends:
            return other_ends.pop(key)
        end, other_ends[key] = map(stack.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM))
        return end

    def sockets_of(rank: int) -> list[socket.socket]:
        outgoing = [end_of(rank, distance) for distance in distances]
        return [*outgoing, *(end_of(rank - distance, distance) for distance in distances)]

    own = sockets_of(0)
    for rank in range(1, size):
        sockets = sockets_of(rank)
        socket.send_fds(connections[rank], [b"!"], [memory, *(end.fileno() for end in sockets)])
        for connection in (connections[rank], *sockets):
            connection.close()
    return [os.dup(memory), *(end.detach() for end in own)]


def _connect(endpoint: socket.socket, address: str) -> None:
    """Connects as soon as rank 0 listens.

    Raises:
        ConnectionError: it does not listen in time.
    """
    until = time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        try:
            return endpoint.connect(address)
        except (ConnectionRefusedError, BlockingIOError):  # it does not listen yet, or its queue is full
            if time.monotonic() > until:
                raise ConnectionError("rank 0 does not listen") from None
            time.sleep(0.005)
