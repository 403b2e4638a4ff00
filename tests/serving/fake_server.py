"""A fake server that fails on demand, delays its responses and records its calls.

Its one model, `digits`, returns its inputs, and classifies an image by its mean.
"""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np

from protos import grpc_service_pb2 as pb
from protos import model_config_pb2 as mc

SERVICE = "/inference.GRPCInferenceService/"


class Failure(Exception):
    """Raised by a handler to respond with an error."""

    def __init__(self, code: grpc.StatusCode, details: str, **trailers: str) -> None:
        super().__init__(details)
        self.code, self.details = code, details
        self.trailers = tuple((name.replace("_", "-"), value) for name, value in trailers.items())


class FakeServer:
    """Listens on a port of its own.

    Attributes:
        failures: responses of the next calls, in order; None for a good one.
        delay_s: duration of an inference.
        classifies: whether it knows the classification extension.
        typed: whether outputs are sent as typed contents in place of raw ones.
        config: the model's configuration.
        calls: method names in the order of the calls.
        metadata: metadata of each call.
        infers: the requests of all inferences.
        most_at_once: largest number of inferences that ran at the same time.
    """

    def __init__(self, *, credentials: Any = None, address: str = "127.0.0.1:0") -> None:
        self.failures: list[Failure | None] = []
        self.delay_s = 0.0
        self.classifies = True
        self.typed = False
        self.config = image_config()
        self.calls: list[str] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.infers: list[pb.ModelInferRequest] = []
        self.most_at_once = self._running = 0
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(16))
        self._server.add_generic_rpc_handlers((_Handlers(self._answer),))
        if credentials is None:
            self.port = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, credentials)
        self.target = f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(0).wait()

    def _answer(self, method: str, payload: bytes, context: grpc.ServicerContext) -> bytes:
        with self._lock:
            self.calls.append(method)
            self.metadata.append(dict(context.invocation_metadata()))
            failure = self.failures.pop(0) if self.failures else None
        try:
            if failure is not None:
                raise failure
            return self._handlers()[method](payload)
        except Failure as failed:
            context.set_trailing_metadata(failed.trailers)
            context.abort(failed.code, failed.details)
            raise AssertionError("abort raises") from failed

    def _handlers(self) -> Mapping[str, Callable[[bytes], bytes]]:
        state = pb.RepositoryIndexResponse.ModelIndex(name="digits", version="3", state="READY")
        broken = pb.RepositoryIndexResponse.ModelIndex(name="torn", state="UNAVAILABLE", reason="half a file")
        return {
            "ServerLive": lambda _: pb.ServerLiveResponse(live=True).SerializeToString(),
            "ServerReady": lambda _: pb.ServerReadyResponse(ready=False).SerializeToString(),
            "ModelReady": lambda _: pb.ModelReadyResponse(ready=True).SerializeToString(),
            "ServerMetadata": lambda _: pb.ServerMetadataResponse(name="fake", version="9").SerializeToString(),
            "ModelConfig": lambda _: pb.ModelConfigResponse(config=self.config).SerializeToString(),
            "RepositoryIndex": lambda _: pb.RepositoryIndexResponse(models=[state, broken]).SerializeToString(),
            "RepositoryModelLoad": lambda _: pb.RepositoryModelLoadResponse().SerializeToString(),
            "ModelInfer": self._infer,
        }

    def _infer(self, payload: bytes) -> bytes:
        request = pb.ModelInferRequest.FromString(payload)
        with self._lock:
            self.infers.append(request)
            self._running += 1
            self.most_at_once = max(self.most_at_once, self._running)
        time.sleep(self.delay_s)
        with self._lock:
            self._running -= 1
        answer = pb.ModelInferResponse(model_name=request.model_name, model_version="3", id=request.id)
        if self.classifies and request.outputs and "classification" in request.outputs[0].parameters:
            _classify(request, answer)
        else:
            _echo(request, answer, typed=self.typed)
        return bytes(answer.SerializeToString())


def image_config(
    *dims: int, max_batch_size: int = 4, outputs: tuple[str, ...] = ("logits", "probabilities")
) -> mc.ModelConfig:
    """The configuration of an image classifier; by default 28 by 28, grey."""
    return mc.ModelConfig(
        name="digits",
        max_batch_size=max_batch_size,
        input=[mc.ModelInput(name="images", data_type=mc.TYPE_UINT8, dims=dims or (1, 28, 28))],
        output=[mc.ModelOutput(name=name, data_type=mc.TYPE_FP32, dims=[10]) for name in outputs],
    )


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, answer: Callable[[str, bytes, grpc.ServicerContext], bytes]) -> None:
        self._answer = answer

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        method = details.method.removeprefix(SERVICE)
        return grpc.unary_unary_rpc_method_handler(lambda payload, context: self._answer(method, payload, context))


def _classify(request: pb.ModelInferRequest, answer: pb.ModelInferResponse) -> None:
    """The probability of class 0 is the mean of the image. Its label contains a colon."""
    top_k = request.outputs[0].parameters["classification"].int64_param
    top_k = min(top_k, 2)
    shape = tuple(request.inputs[0].shape)
    images = np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(shape if len(shape) == 4 else (1, *shape))
    cells = b""
    for image in images:
        light = float(image.mean()) / 255
        for text in (b"%.6f:0:light: very" % light, b"%.6f:1" % (1 - light))[:top_k]:
            cells += len(text).to_bytes(4, "little") + text
    answer.outputs.add(name="probabilities", datatype="BYTES", shape=[len(images), top_k])
    answer.raw_output_contents.append(cells)


def _echo(request: pb.ModelInferRequest, answer: pb.ModelInferResponse, *, typed: bool) -> None:
    for given, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        output = answer.outputs.add(name=given.name, datatype=given.datatype, shape=given.shape)
        if typed:
            output.contents.fp32_contents.extend(np.frombuffer(raw, np.float32))
        else:
            answer.raw_output_contents.append(raw)
