"""`POST v2/models/M[/versions/V]/classify`: image files in, labels with probabilities out, without a client library.

$ curl -F file=@cat.jpg -F file=@dog.png localhost:8000/v2/models/pets/classify?top_k=1
{"model_name":"pets","model_version":"1","images":[
  {"file":"cat.jpg","predictions":[{"index":0,"label":"cat","probability":0.981}]}, …]}
"""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from serving.errors import InvalidArgument, quote
from serving.frontends.http.body import read_body
from serving.frontends.http.executor import MAX_INLINE_BYTES, BoundedExecutor
from serving.frontends.http.infer import begin_request
from serving.frontends.http.loop_bridge import LoopBridge, await_response
from serving.frontends.http.responses import SUBMITTED, json_response
from serving.frontends.http.uploads import File, read_files
from serving.inference.request import InferInput, InferRequest, InferResponse, RequestedOutput
from serving.inference.service import InferenceService
from serving.protocol.tensors import DATATYPES, Elements, to_array

PROBABILITIES = "probabilities"
"""The output that is requested."""
DEFAULT_TOP_K = 5


class ClassifyEndpoint:
    """The endpoint. Its requests share their batches with all others.

    Args:
        executor: takes large forms apart.
    """

    def __init__(
        self, service: InferenceService, bridge: LoopBridge, executor: BoundedExecutor, max_body_bytes: int
    ) -> None:
        self._service = service
        self._bridge = bridge
        self._executor = executor
        self._max_body_bytes = max_body_bytes

    async def classify(self, request: Request) -> Response:
        """Answers a request."""
        scope = request.scope
        headers = dict(scope["headers"])
        context = begin_request(scope, headers, self._service.tracing)
        top_k = _top_k(request.query_params.get("top_k"))
        name, version = request.path_params["model"], request.path_params.get("version", "")
        images = self._service.repository.get(name, version).images
        if images is None:
            raise InvalidArgument(f"model {quote(name)} does not take image files: its manifest does not describe them")
        body = await read_body(scope, request.receive, self._max_body_bytes, self._executor)
        arguments = body, headers.get(b"content-type", b""), images.max_images
        is_large = len(body) > MAX_INLINE_BYTES
        files = await self._executor.run(read_files, *arguments) if is_large else read_files(*arguments)
        contents = Elements(DATATYPES["BYTES"], [content for _, content in files])
        inference = InferRequest(
            name,
            [InferInput(images.name, "BYTES", (len(files),), contents)],
            version,
            outputs=[RequestedOutput(PROBABILITIES, top_k)],
        )
        scope[SUBMITTED] = True
        response: InferResponse = await await_response(
            self._bridge, lambda sink: self._service.submit(inference, context, sink), None, request.receive
        )
        scope[SUBMITTED] = False  # as in `InferEndpoint`
        return json_response(_described(response, files))


def _top_k(text: str | None) -> int:
    if text is None:
        return DEFAULT_TOP_K
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 0 < int(text) < 1 << 16):
        raise InvalidArgument(f"top_k must be a positive whole number, got {quote(text)}")
    return int(text)


def _described(response: InferResponse, files: list[File]) -> dict[str, Any]:
    """Returns the response as JSON has it."""
    [output] = response.outputs
    rows = to_array(DATATYPES["BYTES"], output.shape, output.data).reshape(len(files), -1)
    return {
        "model_name": response.model_name,
        "model_version": response.model_version,
        "images": [
            {"file": name, "predictions": [_prediction(cell) for cell in row]}
            for (name, _), row in zip(files, rows, strict=True)
        ],
    }


def _prediction(cell: bytes) -> dict[str, Any]:
    """Returns the parts of `value:index:label`; a model without labels has their index in place of them."""
    value, index, *label = cell.decode("utf-8", "replace").split(":", 2)
    return {"index": int(index), "label": label[0] if label else index, "probability": float(value)}
