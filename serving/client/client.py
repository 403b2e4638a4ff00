"""The client: typed calls to one server, numpy in and out.

with Client("127.0.0.1:8001") as client:
    client.infer("mnist", {"images": images})["logits"]
    client.classify("mnist", ["seven.png"])[0].predictions[0].label
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from google.protobuf.message import Message

from protos import grpc_service_pb2 as pb
from protos import model_config_pb2
from serving.client import messages
from serving.client.connection import Connection, Tls
from serving.client.errors import ClientError, invalid
from serving.client.images import ImageInput, Prepared, Source, each_source
from serving.client.results import Answer, Classification, ModelState, Prediction
from serving.protocol.tensors import Array

Response = TypeVar("Response", bound=Message)

DEFAULT_TARGET = "127.0.0.1:8001"
DEFAULT_TIMEOUT_S = 30.0
SCORES = "probabilities"
"""The output that is asked for classes."""

_SERVICE = "/inference.GRPCInferenceService/"
_MAY_HAVE_CHANGED = ("INVALID_ARGUMENT", "NOT_FOUND")
"""After these a model's configuration is read anew: another version may have been loaded."""


class Client:
    """Calls to one server, or to all that a host's name stands for, in turn. Thread-safe; keep one for long.

    Every call has a deadline, and is repeated within it while the server is away or has no room (5 attempts at most;
    the server's hint when to come again is followed). `timeout_s` of a call goes before the client's.

    Args:
        target: `host:port`, or `unix:/path`.
        timeout_s: deadline of a call, attempts and answer together.
        token: sent with each call as a bearer token.
        tls: None for plain text.

    Raises:
        ClientError: an impossible target or unreadable TLS files. Nothing is connected before the first call; all
            methods raise it where a call brings no answer.
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
        """Cancel what is under way and close the connections."""
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
    ) -> Answer:
        """One inference. More rows than the model takes at a time are sent in parts, some of them at once.

        Args:
            inputs: arrays by name, the first dimension being the batch's if the model has one. The dtype must be the
                model's; strings and bytes become BYTES.
            outputs: which are wanted; None for all.
            version: empty for the newest.
            timeout_s: for all parts together.
        """
        arrays = {name: messages.as_array(name, value) for name, value in inputs.items()}
        request = pb.ModelInferRequest(model_name=model, model_version=version, id=request_id)
        for name in outputs or ():
            request.outputs.add(name=name)
        limit = self.config(model, version).max_batch_size if messages.num_rows(arrays) > 1 else 0
        return self._infer(request, messages.split_rows(arrays, limit) if limit else [arrays], timeout_s)

    def classify(
        self,
        model: str,
        images: Source | Sequence[Source],
        *,
        top_k: int = 3,
        version: str = "",
        invert: bool = False,
        timeout_s: float | None = None,
    ) -> list[Classification]:
        """What images show, for a model that takes images of one size and gives `probabilities`.

        Args:
            images: one or many: paths, Pillow images, uint8 arrays ([H, W], [H, W, channels], [C, H, W] as the model
                takes them; many in one array: [N, H, W] or [N, C, H, W]). Resized and made grey or RGB as the model
                needs.
            top_k: how many classes to tell.
            invert: take the negatives.
            timeout_s: for all requests together.
        """
        if top_k < 1:
            raise invalid(f"top_k must be at least 1, and is {top_k}")
        given = self.image_input(model, version)
        prepared = [
            given.prepare(source, name=f"image {number}", invert=invert)
            for number, source in enumerate(each_source(images, given.shape), start=1)
        ]
        if not prepared:
            return []
        request = pb.ModelInferRequest(model_name=model, model_version=version)
        request.outputs.add(name=SCORES).parameters["classification"].int64_param = top_k
        answer = self._infer(request, _batches(given, prepared), timeout_s)
        rows = answer[SCORES].reshape(len(prepared), -1)
        return [
            Classification(image.name, tuple(Prediction.parse(cell) for cell in row), image.warning)
            for image, row in zip(prepared, rows, strict=True)
        ]

    def image_input(self, model: str, version: str = "") -> ImageInput:
        """The images that a model takes; `prepare` of it makes them. Asked of the server once."""
        config = self.config(model, version)
        if SCORES not in (output.name for output in config.output):
            told = ", ".join(output.name for output in config.output)
            raise invalid(f"model {model!r} does not classify: it has no output {SCORES!r}, only {told}")
        return ImageInput.of(config)

    def _infer(
        self, base: pb.ModelInferRequest, parts: Iterable[Mapping[str, Array]], timeout_s: float | None
    ) -> Answer:
        """`base`, with the inputs of each part in turn, and the answers as one."""
        requests = (messages.with_inputs(base, arrays) for arrays in parts)
        try:
            responses = list(
                self._connection.call_each(_SERVICE + "ModelInfer", requests, pb.ModelInferResponse, timeout_s)
            )
        except ClientError as error:
            if error.code in _MAY_HAVE_CHANGED:
                self._configs.pop((base.model_name, base.model_version), None)
            raise
        first = responses[0]
        outputs = messages.joined([messages.outputs_of(response) for response in responses])
        return Answer(first.model_name, first.model_version, first.id, outputs)

    # ---- The server and its models -----------------------------------------------------------------------------------

    def is_live(self) -> bool:
        """Whether the server runs."""
        return self._call("ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse).live

    def is_ready(self, model: str = "", version: str = "") -> bool:
        """Whether the server, or one model, takes inferences."""
        if not model:
            return self._call("ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse).ready
        return self._call("ModelReady", pb.ModelReadyRequest(name=model, version=version), pb.ModelReadyResponse).ready

    def server(self) -> pb.ServerMetadataResponse:
        """The server's name, version and extensions."""
        return self._call("ServerMetadata", pb.ServerMetadataRequest(), pb.ServerMetadataResponse)

    def metadata(self, model: str, version: str = "") -> pb.ModelMetadataResponse:
        """A model's versions, inputs and outputs; shapes with the batch dimension."""
        request = pb.ModelMetadataRequest(name=model, version=version)
        return self._call("ModelMetadata", request, pb.ModelMetadataResponse)

    def config(self, model: str, version: str = "") -> model_config_pb2.ModelConfig:
        """A model's configuration. Asked once, and again after an error that a new version may explain."""
        if (model, version) not in self._configs:
            request = pb.ModelConfigRequest(name=model, version=version)
            self._configs[model, version] = self._call("ModelConfig", request, pb.ModelConfigResponse).config
        return self._configs[model, version]

    def statistics(self, model: str = "", version: str = "") -> list[pb.ModelStatistics]:
        """Counts and times of one model, or of all."""
        request = pb.ModelStatisticsRequest(name=model, version=version)
        return list(self._call("ModelStatistics", request, pb.ModelStatisticsResponse).model_stats)

    def index(self, *, ready_only: bool = False) -> list[ModelState]:
        """What the repository holds."""
        answer = self._call("RepositoryIndex", pb.RepositoryIndexRequest(ready=ready_only), pb.RepositoryIndexResponse)
        return [ModelState(model.name, model.version, model.state, model.reason) for model in answer.models]

    def load(self, model: str, *, config: Mapping[str, Any] | None = None, timeout_s: float | None = None) -> None:
        """Load a model, or load it again; back when it is ready. `config` goes before the repository's for it."""
        request = pb.RepositoryModelLoadRequest(model_name=model)
        if config is not None:
            request.parameters["config"].string_param = json.dumps(config)
        self._call("RepositoryModelLoad", request, pb.RepositoryModelLoadResponse, timeout_s)
        self._forget(model)

    def unload(self, model: str, *, timeout_s: float | None = None) -> None:
        """Unload a model."""
        request = pb.RepositoryModelUnloadRequest(model_name=model)
        self._call("RepositoryModelUnload", request, pb.RepositoryModelUnloadResponse, timeout_s)
        self._forget(model)

    def _call(self, method: str, request: Message, answer: type[Response], timeout_s: float | None = None) -> Response:
        return self._connection.call(_SERVICE + method, request, answer, timeout_s)

    def _forget(self, model: str) -> None:
        for key in [key for key in self._configs if key[0] == model]:
            self._configs.pop(key, None)


def _batches(given: ImageInput, images: Sequence[Prepared]) -> Iterator[Mapping[str, Array]]:
    """The images in parts that the model takes; without a batch dimension, one by one."""
    if given.batch == 0:
        for image in images:
            yield {given.name: image.pixels}
    else:
        yield from messages.split_rows({given.name: np.stack([image.pixels for image in images])}, given.batch)
