"""The client: typed calls to one server, with numpy arrays as inputs and outputs.

with Client("127.0.0.1:8001") as client:
    client.infer("mnist", {"images": images})["logits"]
    client.classify("mnist", ["seven.png"])[0].predictions[0].label
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from google.protobuf.message import Message

from protos import grpc_service_pb2 as pb
from protos import model_config_pb2
from protos import models_pb2 as control
from serving.client import messages
from serving.client.connection import Connection, Tls
from serving.client.errors import ClientError, invalid_argument, invalid_response
from serving.client.images import ImageFile, ImageInput, ImageSource, PreparedImage, iter_sources
from serving.client.results import Classification, InferResult, ModelState, Prediction
from serving.protocol.tensors import Array

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)

DEFAULT_TARGET = "127.0.0.1:8001"
DEFAULT_TIMEOUT_S = 30.0
SCORES = "probabilities"
"""The output that `classify` requests."""

_SERVICE = "/inference.GRPCInferenceService/"
_CONTROL = "/convoy.models.ModelControl/"
_Output = pb.ModelInferRequest.InferRequestedOutputTensor
_STALE_CONFIG = ("INVALID_ARGUMENT", "NOT_FOUND")
"""Errors after which the client reads a model's configuration again: another version may have been loaded."""


class Client:
    """Calls one server, or in turn all servers that a host name resolves to. Thread-safe; reuse it for many calls.

    Every call has a timeout, and is retried within it while the server is unreachable or its queue is full: at most 5
    times, or as often as the server asks for a retry. `timeout_s` of a call overrides the client's. Nothing is
    connected before the first call. Every method raises ClientError if its call fails.

    Args:
        target: `host:port` or `unix:/path`.
        timeout_s: timeout of a call in seconds, all attempts together.
        token: bearer token to send with each call.
        tls: None for no TLS.

    Raises:
        ClientError: the target is invalid, or a TLS file cannot be read.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        token: str | None = None,
        tls: Tls | None = None,
    ) -> None:
        self._connection = Connection(target, timeout_s=timeout_s, token=token, tls=tls)
        self._configs: dict[tuple[str, str], model_config_pb2.ModelConfig] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels running calls and closes the connections."""
        self._connection.close()

    # ---- Inference ---------------------------------------------------------------------------------------------------

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Any],
        *,
        outputs: Sequence[str] | None = None,
        version: str = "",
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> InferResult:
        """Runs an inference. Sends more rows than the model's maximum batch size in parts, some of them concurrently.

        Args:
            inputs: arrays by name, with the batch dimension first if the model has one, in the model's data types.
                Strings and bytes become BYTES.
            outputs: names of the outputs to return; None for all.
            version: empty for the newest.
            timeout_s: for all parts together.
        """
        arrays = {name: messages.as_array(name, value) for name, value in inputs.items()}
        request = _request(pb.ModelInferRequest, model_name=model, model_version=version, id=request_id)
        request.outputs.extend(_request(_Output, name=name) for name in outputs or ())
        began = time.monotonic()
        limit = self._config(model, version, timeout_s).max_batch_size if messages.num_rows(arrays) > 1 else 0
        parts = messages.split_rows(arrays, limit) if limit > 0 else [arrays]
        return self._infer(request, parts, timeout_s, time.monotonic() - began)

    def classify(
        self,
        model: str,
        images: ImageSource | Sequence[ImageSource],
        *,
        top_k: int = 3,
        version: str = "",
        invert: bool = False,
        timeout_s: float | None = None,
    ) -> list[Classification]:
        """Classifies images, with a model whose input is images of one size and which has an output `probabilities`.

        Args:
            images: one or many: paths, Pillow images or uint8 arrays, [H, W], [H, W, channels] or the model's own
                [C, H, W]; many in one array: [N, H, W] or [N, C, H, W]. They are resized and converted to grey or RGB
                as the model needs them. An `ImageFile` is sent as it is.
            top_k: number of classes to return for each image.
            version: empty for the newest.
            invert: whether to invert the images.
            timeout_s: for all requests together.
        """
        if top_k < 1:
            raise invalid_argument(f"top_k must be at least 1, got {top_k}")
        began = time.monotonic()
        image_input = _image_input(self._config(model, version, timeout_s))
        spent_s = time.monotonic() - began
        prepared = [
            image_input.prepare(source, name=f"image {number}", invert=invert)
            for number, source in enumerate(iter_sources(images, image_input.shape), start=1)
        ]
        if not prepared:
            return []
        request = _request(pb.ModelInferRequest, model_name=model, model_version=version)
        classification = _request(pb.InferParameter, int64_param=top_k)
        request.outputs.add(name=SCORES).parameters["classification"].CopyFrom(classification)
        result = self._infer(request, _batches(image_input, prepared), timeout_s, spent_s)
        scores = result.outputs.get(SCORES)
        if scores is None or scores.dtype != object:
            raise ClientError("UNIMPLEMENTED", "the server does not support the protocol's classification extension")
        try:
            rows = [tuple(map(Prediction.parse, row)) for row in scores.reshape(len(prepared), -1)]
        except ValueError as error:
            raise invalid_response(error) from error
        return [Classification(image.name, row, image.warning) for image, row in zip(prepared, rows, strict=True)]

    def image_input(self, model: str, version: str = "") -> ImageInput:
        """Returns the image input of a model, which prepares images for it. Asks the server only once."""
        return _image_input(self.config(model, version))

    def _infer(
        self, base: pb.ModelInferRequest, parts: Iterable[Mapping[str, Array]], timeout_s: float | None, spent_s: float
    ) -> InferResult:
        """Sends `base` with the inputs of each part, and concatenates the outputs."""
        requests = (messages.add_inputs(base, arrays) for arrays in parts)
        try:
            responses = list(
                self._connection.call_many(_SERVICE + "ModelInfer", requests, pb.ModelInferResponse, timeout_s, spent_s)
            )
        except ClientError as error:
            if error.code in _STALE_CONFIG:
                self._configs.pop((base.model_name, base.model_version), None)
            raise
        first = responses[0]
        outputs = messages.concatenate([messages.read_outputs(response) for response in responses])
        return InferResult(first.model_name, first.model_version, first.id, outputs)

    # ---- The server and its models -----------------------------------------------------------------------------------

    def is_live(self) -> bool:
        """Returns whether the server is live."""
        return self._call("ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse).live

    def is_ready(self, model: str = "", version: str = "") -> bool:
        """Returns whether the server, or one model, is ready for inference."""
        if not model:
            return self._call("ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse).ready
        request = _request(pb.ModelReadyRequest, name=model, version=version)
        return self._call("ModelReady", request, pb.ModelReadyResponse).ready

    def server_metadata(self) -> pb.ServerMetadataResponse:
        """Returns the server's name, version and extensions."""
        return self._call("ServerMetadata", pb.ServerMetadataRequest(), pb.ServerMetadataResponse)

    def metadata(self, model: str, version: str = "") -> pb.ModelMetadataResponse:
        """Returns a model's versions, inputs and outputs. Shapes include the batch dimension."""
        request = _request(pb.ModelMetadataRequest, name=model, version=version)
        return self._call("ModelMetadata", request, pb.ModelMetadataResponse)

    def config(self, model: str, version: str = "") -> model_config_pb2.ModelConfig:
        """Returns a model's configuration. Cached until an inference fails in a way that a new version may explain."""
        return self._config(model, version)

    def statistics(self, model: str = "", version: str = "") -> list[pb.ModelStatistics]:
        """Returns the statistics of one model, or of all."""
        request = _request(pb.ModelStatisticsRequest, name=model, version=version)
        return list(self._call("ModelStatistics", request, pb.ModelStatisticsResponse).model_stats)

    def index(self, *, ready_only: bool = False) -> list[ModelState]:
        """Returns the repository index."""
        answer = self._call("RepositoryIndex", pb.RepositoryIndexRequest(ready=ready_only), pb.RepositoryIndexResponse)
        return [ModelState(model.name, model.version, model.state, model.reason) for model in answer.models]

    def load(self, model: str, *, config: Mapping[str, Any] | None = None, timeout_s: float | None = None) -> None:
        """Loads or updates a model; returns when it is ready.

        Args:
            config: replaces the configuration in the repository, in protobuf's JSON form.
        """
        request = _request(pb.RepositoryModelLoadRequest, model_name=model)
        if config is not None:
            request.parameters["config"].string_param = json.dumps(config)
        self._call("RepositoryModelLoad", request, pb.RepositoryModelLoadResponse, timeout_s)
        self._forget(model)

    def unload(self, model: str, *, timeout_s: float | None = None) -> None:
        """Unloads a model; returns when its requests are finished."""
        request = _request(pb.RepositoryModelUnloadRequest, model_name=model)
        self._call("RepositoryModelUnload", request, pb.RepositoryModelUnloadResponse, timeout_s)
        self._forget(model)

    def models(self, model: str = "") -> list[control.ModelState]:
        """Returns which version serves, and which could, of one model or of all."""
        request = _request(control.ListModelsRequest, name=model)
        return list(self._connection.call(_CONTROL + "ListModels", request, control.ListModelsResponse).models)

    def promote(self, model: str, version: int, *, timeout_s: float | None = None) -> control.ModelState:
        """Lets a version serve until a newer one is exported; returns when it serves.

        This and the next three raise DEADLINE_EXCEEDED while a version loads that takes longer than `timeout_s`. The
        server goes on with the change.
        """
        return self._change("Promote", _request(control.PromoteRequest, name=model, version=version), timeout_s)

    def roll_back(self, model: str, *, timeout_s: float | None = None) -> control.ModelState:
        """Lets the version serve that served before the one that serves now; returns when it serves."""
        serving = self.models(model)[0].serving  # so that a repeated call changes nothing
        return self._change("RollBack", _request(control.RollBackRequest, name=model, version=serving), timeout_s)

    def pin(self, model: str, version: int, *, timeout_s: float | None = None) -> control.ModelState:
        """Lets a version serve until it is unpinned, whatever is exported; returns when it serves."""
        return self._change("Pin", _request(control.PinRequest, name=model, version=version), timeout_s)

    def unpin(self, model: str, *, timeout_s: float | None = None) -> control.ModelState:
        """Lets versions take over again that are newer than the pinned one."""
        return self._change("Unpin", _request(control.UnpinRequest, name=model), timeout_s)

    def _change(self, method: str, request: Any, timeout_s: float | None) -> control.ModelState:
        state = self._connection.call(_CONTROL + method, request, control.ModelState, timeout_s)
        self._forget(request.name)
        return state

    def _config(self, model: str, version: str, timeout_s: float | None = None) -> model_config_pb2.ModelConfig:
        config = self._configs.get((model, version))
        if config is None:
            request = _request(pb.ModelConfigRequest, name=model, version=version)
            config = self._call("ModelConfig", request, pb.ModelConfigResponse, timeout_s).config
            self._configs[model, version] = config
        return config

    def _call(self, method: str, request: Message, kind: type[Response], timeout_s: float | None = None) -> Response:
        return self._connection.call(_SERVICE + method, request, kind, timeout_s)

    def _forget(self, model: str) -> None:
        for key in [key for key in self._configs if key[0] == model]:
            self._configs.pop(key, None)


def _request(kind: type[Request], **fields: Any) -> Request:
    """Returns a message.

    Raises:
        ClientError: a name is not UTF-8, or a number too large.
    """
    try:
        message: Request = kind(**fields)
        return message
    except ValueError as error:
        values = ", ".join(map(repr, fields.values()))
        raise invalid_argument(f"one of {values} cannot be sent: {error}") from error


def _image_input(config: model_config_pb2.ModelConfig) -> ImageInput:
    if SCORES not in (output.name for output in config.output):
        outputs = ", ".join(output.name for output in config.output)
        raise invalid_argument(
            f"model {config.name!r} is not a classifier: it has no output {SCORES!r}, only {outputs}"
        )
    return ImageInput.from_config(config)


def _batches(image_input: ImageInput, images: Sequence[PreparedImage | ImageFile]) -> Iterator[Mapping[str, Array]]:
    """Yields the images in parts of at most the maximum batch size; one by one for a model that does not batch."""
    files = [image.content for image in images if isinstance(image, ImageFile)]
    pixels = [image.pixels for image in images if isinstance(image, PreparedImage)]
    if files and pixels:
        raise invalid_argument("some images are files to be sent as they are, others are not: send them apart")
    if files:
        yield from messages.split_rows({image_input.name: np.array(files, object)}, max(1, image_input.max_batch_size))
    elif image_input.max_batch_size < 1:
        for image in pixels:
            yield {image_input.name: image}
    else:
        yield from messages.split_rows({image_input.name: np.stack(pixels)}, image_input.max_batch_size)
