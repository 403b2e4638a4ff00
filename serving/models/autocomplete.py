"""Completes a configuration: fills in what `config.pbtxt` leaves out and the version's files determine.

Triton calls this auto-complete. Opens no model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from protos.model_config_pb2 import ModelConfig, ModelInput, ModelOutput
from serving.backends import registry
from serving.backends.registry import BackendType
from serving.errors import LoadError, TransientLoadError
from serving.models.files import describe, is_file
from serving.models.spec import check_inside
from serving.protocol.tensors import TensorSpec

DEFAULT_MAX_BATCH_SIZE = 64
"""For a model that can batch and whose configuration sets neither tensors nor a batch size."""


def complete_backend(config: ModelConfig, version_folder: Path) -> BackendType:
    """Fills in backend, platform and file name, from each other and from the files in the folder.

    Returns:
        The backend.

    Raises:
        TransientLoadError: the file cannot be looked at.
        LoadError: the backend is unknown, backend and platform contradict each other, or the file is missing.
    """
    backend = _choose_backend(config, version_folder)
    config.backend = backend.backend
    config.platform = backend.platform
    config.default_model_filename = config.default_model_filename or backend.filename
    check_inside("default_model_filename", config.default_model_filename)
    if not _has_file(version_folder, config.default_model_filename):
        raise LoadError(f"there is no file '{config.default_model_filename}' in version {version_folder.name}")
    return backend


def complete_tensors(config: ModelConfig, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Fills in missing inputs and outputs, and the batch size if the configuration sets none of the three.

    Args:
        inputs: the model's inputs, with the batch dimension.
        outputs: the model's outputs, with the batch dimension.

    Raises:
        LoadError: the configuration sets a batch size, and the model has no batch dimension.
    """
    can_batch = all(spec.shape[:1] == (-1,) for spec in (*inputs, *outputs))
    if can_batch and not (config.max_batch_size or config.input or config.output):
        config.max_batch_size = DEFAULT_MAX_BATCH_SIZE
        if config.WhichOneof("scheduling_choice") is None:
            config.dynamic_batching.SetInParent()
    if not config.input:
        config.input.extend(ModelInput(**_tensor_fields(config, spec)) for spec in inputs)
    if not config.output:
        config.output.extend(ModelOutput(**_tensor_fields(config, spec)) for spec in outputs)


def _choose_backend(config: ModelConfig, version_folder: Path) -> BackendType:
    """Returns the configured backend; where the configuration leaves a choice, the one whose file is there."""
    for name in (config.backend, config.platform):
        if name and not registry.is_backend(name):
            raise LoadError(f"backend '{name}' is not supported: this server has {registry.names()}")
    candidates = registry.find_own(config.backend, config.platform)
    if not candidates:
        configured = {config.backend, config.platform} - {""}
        if len(configured) > 1:
            raise LoadError(f"backend '{config.backend}' and platform '{config.platform}' contradict each other")
        return registry.get_other(configured.pop())
    filename = config.default_model_filename
    for backend in candidates:
        name = filename or backend.filename
        if Path(name).suffix == Path(backend.filename).suffix and _has_file(version_folder, name):
            return backend
    if len(candidates) == 1 or config.backend or config.platform:
        return candidates[0]
    expected = filename or " or ".join(backend.filename for backend in candidates)
    raise LoadError(f"there is no {expected} in version {version_folder.name}")


def _has_file(folder: Path, name: str) -> bool:
    try:
        return is_file(folder / name)
    except OSError as error:
        raise TransientLoadError(f"{name} in version {folder.name} cannot be read: {describe(error)}") from error


def _tensor_fields(config: ModelConfig, spec: TensorSpec) -> dict[str, Any]:
    if config.max_batch_size and spec.shape[:1] != (-1,):
        raise LoadError(
            f"max_batch_size is {config.max_batch_size}, but the model's '{spec.name}' has shape {list(spec.shape)}, "
            f"which does not begin with a batch dimension: set max_batch_size to 0"
        )
    dims = spec.shape[1:] if config.max_batch_size else spec.shape
    return {"name": spec.name, "data_type": spec.datatype.config_name, "dims": dims}
