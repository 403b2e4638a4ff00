"""Opens the instances of one model version on its devices."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from serving.backends import Backend, BackendInstance, registry
from serving.models.devices import CudaUnavailable, Device, InstanceGroup, assign_devices, threads_per_instance
from serving.models.spec import ModelSpec
from serving.models.time_limit import open_with_limit

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OpenedInstance:
    """An instance that has been opened, and where."""

    backend: Backend
    gpu: int | None
    group: InstanceGroup


def open_instances(
    version_folder: Path, spec: ModelSpec, device: Device, num_threads: int | None, limit_s: float
) -> Sequence[OpenedInstance]:
    """Opens the instances; on the CPU if the GPUs do not work and neither operator nor model requires them.

    Args:
        device: which devices may be used.
        num_threads: CPU threads of all instances together; None for all CPUs that this process may use.
        limit_s: for opening all of them; 0 for none.

    Raises:
        LoadError: an instance cannot be opened. None is left open.
    """
    try:
        return _open_on(assign_devices(spec.instances, device), version_folder, spec, num_threads, limit_s)
    except CudaUnavailable as error:
        if device == "cuda" or any(group.kind == "gpu" for group in spec.instances):
            raise
        logger.warning("%s runs on the CPU: %s", spec.name, error)
        return _open_on(assign_devices(spec.instances, "cpu"), version_folder, spec, num_threads, limit_s)


def _open_on(
    assigned: Sequence[tuple[int | None, InstanceGroup]],
    version_folder: Path,
    spec: ModelSpec,
    num_threads: int | None,
    limit_s: float,
) -> Sequence[OpenedInstance]:
    """Opens instances on their GPUs; None is the CPU."""
    gpus = [gpu for gpu, _ in assigned]
    threads = threads_per_instance(len(gpus), num_threads)
    devices = ", ".join("CPU" if gpu is None else f"GPU {gpu}" for gpu in sorted(set(gpus), key=str))
    where = f"{spec.name} version {version_folder.name} on {devices}"
    logger.info("%s: instances %d, CPU threads of each %d", where, len(gpus), threads)
    backend = registry.of_spec(spec)

    def open_all() -> list[Backend]:
        with ExitStack() as close_on_error:
            instances: list[Backend] = []
            for gpu in gpus:
                opened = backend.load(version_folder / spec.filename, spec, gpu, threads)
                instance = BackendInstance(opened, inputs=spec.inputs, outputs=spec.outputs, uses_gpu=gpu is not None)
                close_on_error.callback(instance.close)
                instances.append(instance)
            close_on_error.pop_all()
            return instances

    backends = open_with_limit(open_all, limit_s)
    return [OpenedInstance(backend, gpu, group) for backend, (gpu, group) in zip(backends, assigned, strict=True)]
