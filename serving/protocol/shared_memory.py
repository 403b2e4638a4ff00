"""The RPCs that register clients' system shared memory, as messages and over bytes.

CUDA shared memory cannot be registered. Its status and unregistering it are no errors: Triton's clients unregister both
kinds before they register one.
"""

from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.message import Message

from protos import grpc_service_pb2 as pb
from serving.errors import NotFound, quote
from serving.inference.shared_memory import SharedMemory
from serving.protocol.handling import handler
from serving.protocol.methods import INFERENCE_SERVICE


class SharedMemoryService:
    """Registers regions.

    Attributes:
        unary: as in `AdminService`.
    """

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory
        methods: dict[str, tuple[type[Message], Callable[[Any], Message]]] = {
            "SystemSharedMemoryStatus": (pb.SystemSharedMemoryStatusRequest, lambda r: self.status(r.name)),
            "SystemSharedMemoryRegister": (
                pb.SystemSharedMemoryRegisterRequest,
                lambda r: self.register(r.name, r.key, r.offset, r.byte_size),
            ),
            "SystemSharedMemoryUnregister": (
                pb.SystemSharedMemoryUnregisterRequest,
                lambda r: self.unregister(r.name),
            ),
            "CudaSharedMemoryStatus": (pb.CudaSharedMemoryStatusRequest, lambda r: self.cuda_status(r.name)),
            "CudaSharedMemoryUnregister": (
                pb.CudaSharedMemoryUnregisterRequest,
                lambda r: pb.CudaSharedMemoryUnregisterResponse(),
            ),
        }
        self.unary: Mapping[str, Callable[[bytes], bytes]] = {
            f"/{INFERENCE_SERVICE}/{name}": handler(*method) for name, method in methods.items()
        }

    def status(self, name: str = "") -> pb.SystemSharedMemoryStatusResponse:
        """Returns one region; all of them, if `name` is empty.

        Raises:
            NotFound: it is not registered.
        """
        response = pb.SystemSharedMemoryStatusResponse()
        for region in self._memory.regions(name):
            status = response.regions[region.name]
            status.name, status.key = region.name, region.key
            status.offset, status.byte_size = region.offset, region.num_bytes
        return response

    def cuda_status(self, name: str) -> pb.CudaSharedMemoryStatusResponse:
        """Returns no regions.

        Raises:
            NotFound: a region is named.
        """
        if name:
            raise NotFound(f"unable to find cuda shared memory region {quote(name)}: none can be registered")
        return pb.CudaSharedMemoryStatusResponse()

    def register(self, name: str, key: str, offset: int, num_bytes: int) -> pb.SystemSharedMemoryRegisterResponse:
        """Registers a region.

        Raises:
            InvalidArgument: the name is taken, or there is no such memory.
        """
        self._memory.register(name, key, offset, num_bytes)
        return pb.SystemSharedMemoryRegisterResponse()

    def unregister(self, name: str = "") -> pb.SystemSharedMemoryUnregisterResponse:
        """Forgets a region; all of them, if `name` is empty."""
        self._memory.unregister(name)
        return pb.SystemSharedMemoryUnregisterResponse()
