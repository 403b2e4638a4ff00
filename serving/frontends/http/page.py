"""The API of the page at `/`: how the server prepares an image, what layers make of it, and images with their labels.

Inferences, promotions and the rest go through the protocol's own endpoints. With `--web off` nothing of this exists.
"""

from base64 import b64encode
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from convoy.auth import TokenFile
from convoy.images import Pixels
from convoy.web.page import page_routes
from serving.backends.onnx_layers import Layer, OnnxLayers
from serving.errors import InvalidArgument, NotFound, PermissionDenied, Unavailable, quote
from serving.frontends.common.services import Services
from serving.frontends.http.body import read_body
from serving.frontends.http.counting import counted
from serving.frontends.http.executor import BoundedExecutor
from serving.frontends.http.live import LiveEvents
from serving.frontends.http.loop_bridge import LoopBridge, await_response
from serving.frontends.http.page_models import describe_models
from serving.frontends.http.responses import json_response
from serving.frontends.http.saved_images import SavedImages
from serving.frontends.http.server import HttpServer
from serving.frontends.http.settings import PageSettings
from serving.inference.image_files import ImageFiles
from serving.inference.request import InferInput
from serving.models.images import ImageTensor
from serving.models.repository import Model
from serving.protocol.tensors import DATATYPES, Elements

SECTIONS = ("try", "inside", "serve", "lecture")
MAX_OPEN_LAYERS = 2
"""Models whose layers are kept open for the next request."""


def build_page(
    services: Services,
    server: HttpServer,
    settings: PageSettings,
    bridge: LoopBridge,
    max_body_bytes: int,
    tokens: TokenFile | None,
) -> list[Route]:
    """Returns the routes of the page's files, which need no token, and of its requests for data, which do."""
    executor = server.executor("page", "requests of pages are being answered", num_threads=1, max_pending=16)
    endpoints = PageEndpoints(services, settings, bridge, executor, max_body_bytes)
    health = services.admin.health
    events = LiveEvents(services.admin.repository, lambda: server.is_stopping or health.is_draining, tokens)
    return [
        *_static_routes(settings, max_body_bytes),
        *counted(_api_routes(endpoints, events), services.inference.refusals.calls),
    ]


def _static_routes(settings: PageSettings, max_body_bytes: int) -> list[Route]:
    options: dict[str, dict[str, Any]] = {
        "try": {
            "saves": None if settings.save_images is None else settings.save_images.name,
            "max_bytes": max_body_bytes,
        },
        "serve": {"workers": settings.num_workers},
    }
    return page_routes(SECTIONS, title="Convoy", options=options)


def _api_routes(endpoints: "PageEndpoints", events: LiveEvents) -> list[Route]:
    model = "/web/api/models/{model}"
    return [
        Route("/web/api/models", endpoints.page_models),
        Route("/web/api/events", events.page_events),
        Route(f"{model}/prepare", endpoints.page_prepare, methods=["POST"]),
        Route(f"{model}/layers", endpoints.page_layers, methods=["POST"]),
        Route(f"{model}/save", endpoints.page_save, methods=["POST"]),
    ]


class PageEndpoints:
    """The endpoints.

    Args:
        executor: reads manifests, runs layers, and writes images.
    """

    def __init__(
        self,
        services: Services,
        settings: PageSettings,
        bridge: LoopBridge,
        executor: BoundedExecutor,
        max_body_bytes: int,
    ) -> None:
        self._services = services
        self._repository = services.admin.repository
        self._saved = None if settings.save_images is None else SavedImages(settings.save_images)
        self._bridge = bridge
        self._executor = executor
        self._max_body_bytes = max_body_bytes
        self._layers: OrderedDict[tuple[Path, int, int], OnnxLayers] = OrderedDict()

    async def page_models(self, request: Request) -> Response:
        """Returns all models with their versions: state, accuracy as served, age."""
        return json_response(await self._executor.run(describe_models, self._services.admin))

    async def page_prepare(self, request: Request) -> Response:
        """Returns the pixels that the model sees in place of an image file."""
        model, images = self._find(request)
        pixels = await self._decode(await self._body(request), images, request)
        return json_response({"version": model.version, "shape": images.shape, "pixels": _base64(pixels[0])})

    async def page_layers(self, request: Request) -> Response:
        """Returns what the first layers make of pixels, as `page_prepare` returns them."""
        model, images = self._find(request)
        body = await self._body(request)
        if len(body) != np.prod(images.shape):
            raise InvalidArgument(f"expected {np.prod(images.shape)} bytes of pixels, got {len(body)}")
        pixels = np.frombuffer(body, np.uint8).reshape(1, *images.shape)
        layers = await self._executor.run(self._run_layers, model, pixels)
        return json_response({"version": model.version, "layers": [_described(layer) for layer in layers]})

    async def page_save(self, request: Request) -> Response:
        """Saves an image with the label that a user gives it."""
        if self._saved is None:
            raise PermissionDenied("this server saves no images: start it with --save-images FOLDER")
        model, images = self._find(request)
        label = request.query_params.get("label", "")
        known = {label for labels in model.labels.values() for label in labels}
        if label not in known:
            raise InvalidArgument(f"{quote(label)} is no label of this model")
        content = await self._body(request)
        await self._decode(content, images, request)
        file = await self._executor.run(self._saved.save, label, content)
        num_images = await self._executor.run(self._saved.count)
        return json_response({"file": f"{file.parent.name}/{file.name}", "num_images": num_images})

    def _find(self, request: Request) -> tuple[Model, ImageTensor]:
        """Returns the model of a request, and its input."""
        name = request.path_params["model"]
        model = self._repository.get(name, request.query_params.get("version", ""))
        if model.images is None:
            raise InvalidArgument(f"model {quote(name)} does not take images: its manifest does not describe them")
        return model, model.images

    async def _body(self, request: Request) -> bytes:
        return await read_body(request.scope, request.receive, self._max_body_bytes, self._executor)

    async def _decode(self, content: bytes, images: ImageTensor, request: Request) -> Pixels:
        """Returns the pixels of a file, [1, C, H, W], prepared by the server's pool as for any inference."""
        files = ImageFiles(InferInput(images.name, "BYTES", (1,), Elements(DATATYPES["BYTES"], [content])), images)
        decoder = self._services.inference.decoder
        pixels: Pixels = await await_response(
            self._bridge,
            lambda sink: decoder.submit(files, None, then=sink.succeed, fail=sink.fail),
            None,
            request.receive,
        )
        return pixels

    def _run_layers(self, model: Model, pixels: Pixels) -> list[Layer]:
        """Runs on the executor's one thread."""
        folder = self._repository.standing(model.spec.name)[1].folder
        if folder is None:
            raise Unavailable(f"model {quote(model.spec.name)} is being replaced")
        names = (model.spec.filename, "model.onnx")
        files = (folder / model.version / name for name in names if name.endswith(".onnx"))
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise NotFound("this version has no model.onnx, whose layers could be shown")
        stats = file.stat()
        key = file, stats.st_mtime_ns, stats.st_size
        layers = self._layers.pop(key, None) or OnnxLayers(file)
        self._layers[key] = layers
        while len(self._layers) > MAX_OPEN_LAYERS:
            self._layers.popitem(last=False)
        return layers.run(pixels)


def _described(layer: Layer) -> dict[str, Any]:
    """Returns a layer as JSON has it: its values as bytes between the smallest and the largest."""
    return {
        "operation": layer.operation,
        "size": layer.field.size,
        "stride": layer.field.stride,
        "start": layer.field.start,
        "num_maps": layer.num_maps,
        "maps": _scaled(layer.maps),
        "filters": None if layer.filters is None else _scaled(layer.filters),
    }


def _scaled(values: npt.NDArray[Any]) -> dict[str, Any]:
    low, high = float(values.min()), float(values.max())
    scaled = np.rint((values - low) * (255 / ((high - low) or 1)))
    return {"shape": values.shape, "low": low, "high": high, "data": _base64(scaled.astype(np.uint8))}


def _base64(array: npt.NDArray[np.uint8]) -> str:
    return b64encode(np.ascontiguousarray(array).tobytes()).decode()
