"""One version of a model, from its folder to a batcher that has been proven: the way of `load_version`.

    verify digests -> read the configuration -> open instances -> warm up -> check the golden batch -> batcher

Knows nothing of other versions, and leaves nothing behind when it fails.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from protos.model_config_pb2 import ModelConfig
from serving.backends import Backend
from serving.errors import LoadError
from serving.inference.batcher import Batcher, BatchLimits
from serving.models.config import ModelSpec, complete_backend, complete_tensors, to_spec
from serving.models.devices import CudaUnusable, Device, assign_devices
from serving.models.manifest import Manifest, read_golden, read_manifest, verify_digests
from serving.models.threads import plan_threads
from serving.models.warmup import check_golden, warm_up
from serving.observability.statistics import Statistics

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """What the operator decides for all models.

    Args:
        num_threads: CPUs that the instances of a model share; None for all that there are.
        max_queue_size: requests, where a model's configuration does not say.
    """

    device: Device = "auto"
    num_threads: int | None = None
    max_queue_size: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """A version that is loaded.

    Args:
        version: the number, as it is written on the wire.
        labels: by output, in the order of the classes.
        load_s: how long loading took.
    """

    spec: ModelSpec
    version: str
    labels: dict[str, list[str]]
    batcher: Batcher
    statistics: Statistics
    load_s: float


def load_version(folder: Path, version: int, config: ModelConfig, settings: LoadSettings) -> Model:
    """Load `folder/version`. What it answers is right, or it does not come to be.

    Args:
        folder: the model's.
        config: as it was read, nothing in it unsupported; not changed.

    Raises:
        LoadError: the reason in one sentence.
    """
    began = time.monotonic()
    version_folder = folder / str(version)
    manifest = read_manifest(version_folder)
    verify_digests(version_folder, manifest)
    spec = resolve_config(config, version_folder, manifest)
    labels = {output: _read_labels(folder / filename) for output, filename in spec.label_files.items()}
    golden = read_golden(version_folder)
    with ExitStack() as undo:
        backends = _open_instances(version_folder, spec, settings, undo)
        measured_rows = min(warm_up(backend, spec, golden) for backend in backends)
        for backend in backends:
            check_golden(backend, spec, golden, manifest.golden_tolerance)
        undo.pop_all()
    limits = BatchLimits(
        max_batch_size=spec.max_batch_size,
        target_batch_size=spec.preferred_rows or measured_rows,
        max_queue_delay_us=spec.max_queue_delay_us,
        max_queue_size=spec.max_queue_size or settings.max_queue_size,
        timeout_us=spec.timeout_us,
    )
    if spec.max_batch_size:
        rows, why = limits.target_batch_size, "preferred_batch_size" if spec.preferred_rows else "measured"
        logger.info("%s version %d: batches are filled up to %d rows (%s)", spec.name, version, rows, why)
    statistics = Statistics()
    return Model(
        spec=spec,
        version=str(version),
        labels=labels,
        batcher=Batcher(spec.name, backends, limits, statistics),
        statistics=statistics,
        load_s=time.monotonic() - began,
    )


def resolve_config(config: ModelConfig, version_folder: Path, manifest: Manifest) -> ModelSpec:
    """The configuration, completed from the manifest or else from the model file itself.

    Raises:
        LoadError: the version cannot be served like that.
    """
    completed = ModelConfig()
    completed.CopyFrom(config)
    complete_backend(completed, version_folder)
    if not (completed.input and completed.output):
        tensors = (manifest.inputs, manifest.outputs)
        if not all(tensors):
            if completed.backend != "onnxruntime":
                raise LoadError("a TorchScript file does not tell its tensors: list input and output in config.pbtxt")
            tensors = _backend_module("onnxruntime").describe(version_folder / completed.default_model_filename)
        complete_tensors(completed, *tensors)
    return to_spec(completed)


def _read_labels(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"the labels in {file.name} cannot be read: {error}") from error


def _backend_module(backend: str) -> ModuleType:
    """Imported when the first model needs it: a server of ONNX models never loads torch."""
    try:
        if backend == "onnxruntime":
            from serving.backends import onnx

            return onnx
        from serving.backends import torchscript

        return torchscript
    except ImportError as error:
        raise LoadError(f"backend '{backend}' needs a library that is not installed: {error}") from error


def _open_instances(
    version_folder: Path, spec: ModelSpec, settings: LoadSettings, undo: ExitStack
) -> Sequence[Backend]:
    """On the GPUs if there are any; on the CPU where they cannot be used and nobody insists."""
    try:
        return _open_on(assign_devices(spec.instances, settings.device), version_folder, spec, settings, undo)
    except CudaUnusable as error:
        if settings.device == "cuda" or any(group.kind == "gpu" for group in spec.instances):
            raise
        logger.warning("%s runs on the CPU: %s", spec.name, error)
        return _open_on(assign_devices(spec.instances, "cpu"), version_folder, spec, settings, undo)


def _open_on(
    placements: Sequence[int | None], version_folder: Path, spec: ModelSpec, settings: LoadSettings, undo: ExitStack
) -> Sequence[Backend]:
    plan = plan_threads(len(placements), settings.num_threads)
    where = ", ".join("CPU" if gpu is None else f"GPU {gpu}" for gpu in sorted(set(placements), key=str))
    logger.info("%s version %s on %s: %s", spec.name, version_folder.name, where, plan)
    module = _backend_module(spec.backend)
    backends: list[Backend] = []
    for gpu in placements:
        backend = module.load(version_folder / spec.filename, spec, gpu, plan.threads_per_instance)
        undo.callback(backend.close)
        backends.append(backend)
    return backends
