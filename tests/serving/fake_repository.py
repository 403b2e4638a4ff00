"""A fake repository without files. Its models are lines of numpy that a test can block, break and replace.

Services, batchers and statistics are real.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from protos.model_config_pb2 import DataType, ModelConfig, ModelInput, ModelOutput
from serving.errors import Internal, NotFound
from serving.frontends.common.services import Services
from serving.inference.batcher import Batcher
from serving.inference.request_queue import BatchLimits
from serving.inference.service import InferenceService
from serving.models.changes import ANYONE, Caller
from serving.models.repository import Model, Repository
from serving.models.spec import ModelSpec, VersionPolicy
from serving.observability.health import Health
from serving.observability.statistics import Statistics
from serving.protocol.admin import AdminService
from serving.protocol.tensors import DATATYPES, Array, TensorSpec

PATIENCE_S = 30

Function = Callable[..., list[Array]]


class BlockingBackend:
    """Runs a numpy function. While `free` is cleared, each batch waits until the test sets it."""

    def __init__(self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], function: Function) -> None:
        self.uses_gpu = False
        self.inputs, self.outputs = inputs, outputs
        self.function = function
        self.began = threading.Semaphore(0)
        self.free = threading.Event()
        self.free.set()
        self.batches: list[int] = []

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        self.batches.append(len(inputs[0]))
        self.began.release()
        assert self.free.wait(PATIENCE_S)
        return [np.ascontiguousarray(output) for output in self.function(*inputs)]

    def close(self) -> None:
        pass


def tensor(name: str, datatype: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, DATATYPES[datatype], shape)


def make_model(
    name: str,
    function: Function,
    tensors: tuple[Sequence[TensorSpec], Sequence[TensorSpec]],
    *,
    version: str = "1",
    labels: Mapping[str, list[str]] | None = None,
    limits: BatchLimits = BatchLimits(max_batch_size=8),  # noqa: B008
) -> Model:
    """Returns a model version; `tensors` are its inputs and outputs."""
    inputs, outputs = map(tuple, tensors)
    spec = ModelSpec(
        name=name,
        backend="python",
        platform="",
        inputs=inputs,
        outputs=outputs,
        max_batch_size=limits.max_batch_size,
        preferred_batch_size=0,
        max_queue_delay_us=0,
        max_queue_size=limits.max_queue_size,
        timeout_us=0,
        version_policy=VersionPolicy(),
        instances=(),
        filename="model.onnx",
        label_files={},
        config=_config(name, inputs, outputs, limits.max_batch_size),
    )
    statistics = Statistics()
    batcher = Batcher(name, [BlockingBackend(inputs, outputs, function)], limits, statistics)
    return Model(
        spec=spec, version=version, labels=dict(labels or {}), batcher=batcher, statistics=statistics, load_s=0.25
    )


def backend_of(model: Model) -> BlockingBackend:
    """Returns the only instance of a model of `make_model`."""
    return cast(BlockingBackend, model.batcher._backends[0])


def twice(*, version: str = "1", **options: Any) -> Model:
    """A model with two outputs: twice the three numbers of a row, and their sum."""
    return make_model(
        "twice",
        lambda x: [2 * x, x.sum(axis=1, keepdims=True)],
        (
            [tensor("numbers", "FP32", -1, 3)],
            [tensor("twice", "FP32", -1, 3), tensor("sum", "FP32", -1, 1)],
        ),
        version=version,
        labels={"twice": ["one", "two", "three"]},
        **options,
    )


def echo(datatype: str) -> Model:
    """A model that returns its input of shape [-1, 2]. Its name is `echo_` and the data type."""
    return make_model(
        f"echo_{datatype}", lambda x: [x], ([tensor("x", datatype, -1, 2)], [tensor("y", datatype, -1, 2)])
    )


def add_without_batch() -> Model:
    """A model with two inputs of any length and no batch dimension."""
    return make_model(
        "add",
        lambda a, b: [a + b],
        ([tensor("a", "INT64", -1), tensor("b", "INT64", -1)], [tensor("c", "INT64", -1)]),
        limits=BatchLimits(max_batch_size=0),
    )


@dataclass(frozen=True)
class Entry:
    """One entry of the repository index."""

    name: str
    version: str
    state: str
    reason: str = ""


class FakeRepository:
    """Ready versions by name and number, and models that can be loaded."""

    def __init__(self, *models: Model) -> None:
        self.generation = 0
        self.models = {(model.spec.name, model.version): model for model in models}
        self.loadable: dict[str, Callable[[], Model]] = {}
        self.broken: list[Entry] = []
        self.configs: list[str | None] = []

    def replace(self, model: Model) -> None:
        """Replaces a version and closes the old one."""
        old = self.models.get((model.spec.name, model.version))
        self.models[model.spec.name, model.version] = model
        self.generation += 1
        if old is not None:
            old.batcher.close()

    def get(self, name: str, version: str = "") -> Model:
        versions = self.versions(name)
        if not versions:
            raise NotFound(f"model '{name}' has no available versions")
        if version and version not in versions:
            raise NotFound(f"Request for unknown model: '{name}' version {version} is not found")
        return self.models[name, version or versions[-1]]

    def versions(self, name: str) -> list[str]:
        if any(entry.name == name for entry in self.broken):
            return []
        versions = sorted((number for known, number in list(self.models) if known == name), key=int)
        if not versions:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        return versions

    def ready_models(self) -> list[Model]:
        return list(self.models.values())

    def is_ready(self) -> bool:
        return not self.broken

    def index(self, ready_only: bool) -> list[Entry]:
        ready = [Entry(name, version, "READY") for name, version in list(self.models)]
        return ready if ready_only else ready + self.broken

    def load(self, name: str, config: str | None = None, caller: Caller = ANYONE) -> None:
        if name not in self.loadable:
            raise Internal(f"failed to load '{name}', no such model in the repository")
        self.configs.append(config)
        self.replace(self.loadable[name]())

    def unload(self, name: str, caller: Caller = ANYONE) -> None:
        for version in self.versions(name):
            self.models.pop((name, version)).batcher.close()
        self.generation += 1

    def close(self) -> None:
        for model in self.models.values():
            backend_of(model).free.set()
            model.batcher.close()


def make_service(repository: FakeRepository) -> InferenceService:
    """A real inference service over a fake repository."""
    return InferenceService(cast(Repository, repository))


def make_services(repository: FakeRepository) -> Services:
    """Real services, ready, over a fake repository."""
    health = Health()
    health.update(True, {model.spec.name: True for model in repository.ready_models()})
    inference = make_service(repository)
    calls = inference.refusals.calls
    return Services(inference, AdminService(cast(Repository, repository), health, calls=calls, version="1.2.3"))


def _config(
    name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], max_batch_size: int
) -> ModelConfig:
    skip = 1 if max_batch_size else 0

    def kind(spec: TensorSpec) -> Any:
        return DataType.Value(spec.datatype.config_name)

    return ModelConfig(
        name=name,
        backend="python",
        max_batch_size=max_batch_size,
        input=[ModelInput(name=spec.name, data_type=kind(spec), dims=spec.shape[skip:]) for spec in inputs],
        output=[ModelOutput(name=spec.name, data_type=kind(spec), dims=spec.shape[skip:]) for spec in outputs],
    )
