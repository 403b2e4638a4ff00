"""A model's configuration: Triton's `config.pbtxt`, completed and checked, as a `ModelSpec`.

Three steps, because a configuration may leave out what the model file tells: `read_config`, then `complete` with the
tensors of a model, then `to_spec`. Knows no backend. A field that asks for something that this server does not do is
refused by its name; one that changes nothing a caller could see is named in a warning.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from google.protobuf import json_format, text_format

from protos.model_config_pb2 import DataType, ModelConfig, ModelInput, ModelInstanceGroup, ModelOutput
from serving.errors import InvalidArgument, LoadError
from serving.models.devices import InstanceGroup
from serving.protocol.tensors import DATATYPES, TensorSpec

CONFIG_FILE = "config.pbtxt"
COMPLETED_MAX_BATCH_SIZE = 64
"""For a model that can batch and whose configuration says nothing at all about tensors and batches."""


@dataclass(frozen=True, slots=True)
class VersionPolicy:
    """Which versions of a model are served.

    Args:
        num_versions: how many of the newest; None for no limit.
        versions: the only ones that count; None for all.
    """

    num_versions: int | None = 1
    versions: tuple[int, ...] | None = None

    def candidates(self, present: Iterable[int]) -> list[int]:
        """The versions to try, best first, until `num_versions` are good. May name versions that are not present."""
        return sorted(present if self.versions is None else self.versions, reverse=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What is known of a model version before it runs.

    Args:
        backend: "onnxruntime" or "pytorch".
        platform: the older name of the same, "onnxruntime_onnx" or "pytorch_libtorch".
        inputs: with the batch dimension in front, as -1, if the model batches.
        max_batch_size: rows; 0 for a model without a batch dimension.
        preferred_rows: what a batch is filled up to, the largest `preferred_batch_size`; 0 for what is measured.
        max_queue_delay_us: how long a request may wait for others.
        max_queue_size: requests; 0 for the server's default.
        timeout_us: how long a request may wait in the queue; 0 for ever.
        instances: empty for the default, one on each GPU, or one on the CPU.
        filename: of the model, in its version's folder.
        label_files: in the model's folder, by the output that they label.
        message: the completed configuration.
    """

    name: str
    backend: str
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int
    preferred_rows: int
    max_queue_delay_us: int
    max_queue_size: int
    timeout_us: int
    version_policy: VersionPolicy
    instances: tuple[InstanceGroup, ...]
    filename: str
    label_files: Mapping[str, str]
    message: ModelConfig


def read_config(folder: Path) -> ModelConfig:
    """The model's `config.pbtxt`; an empty configuration where there is none.

    Raises:
        LoadError: it cannot be read, is no text of a ModelConfig, or names another model.
    """
    config = ModelConfig()
    try:
        text_format.Parse((folder / CONFIG_FILE).read_text(), config)
    except FileNotFoundError:
        pass
    except text_format.ParseError as error:
        raise LoadError(f"{folder.name}/{CONFIG_FILE}:{error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"{folder.name}/{CONFIG_FILE} cannot be read: {error}") from error
    return _named(config, folder.name)


def parse_json(text: str, name: str) -> ModelConfig:
    """A configuration in protobuf's JSON form, as a caller gives it with a load.

    Raises:
        InvalidArgument: it is no JSON of a ModelConfig.
        LoadError: it names another model.
    """
    try:
        document = json.loads(text)
        if not isinstance(document, dict):
            raise ValueError("not an object")
        config = json_format.ParseDict(document, ModelConfig())
    except (json_format.ParseError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"parameter 'config' is no JSON of a model configuration: {error}") from error
    return _named(config, name)


def _named(config: ModelConfig, name: str) -> ModelConfig:
    if config.name not in ("", name):
        raise LoadError(f"the configuration's name is '{config.name}', but the model's folder is '{name}'")
    config.name = name
    return config


# ---- What is refused and what is ignored -----------------------------------------------------------------------------

_REFUSED = {
    "sequence_batching": "requests of a sequence are not kept together",
    "ensemble_scheduling": "ensembles are not supported",
    "model_transaction_policy.decoupled": "each request gets exactly one answer",
    "dynamic_batching.preserve_ordering": "answers come as soon as they are ready",
    "dynamic_batching.priority_levels": "there is one queue, without priorities",
    "dynamic_batching.default_priority_level": "there is one queue, without priorities",
    "dynamic_batching.priority_queue_policy": "there is one queue, without priorities",
    "dynamic_batching.default_queue_policy.timeout_action": "a request past its time-out is refused, never delayed",
    "batch_input": "there are no made-up inputs",
    "batch_output": "outputs are cut by rows only",
    "model_operations": "no operator libraries are loaded",
    "model_repository_agents": "there are no repository agents",
    "cc_model_filenames": "one file serves every GPU: use default_model_filename",
    "input.reshape": "give the dims that the model itself has",
    "input.is_shape_tensor": "there are no shape tensors",
    "input.allow_ragged_batch": "all rows of a batch have one shape",
    "input.optional": "every input must be given",
    "input.is_non_linear_format_io": "tensors are row-major",
    "output.reshape": "give the dims that the model itself has",
    "output.is_shape_tensor": "there are no shape tensors",
    "output.is_non_linear_format_io": "tensors are row-major",
    "instance_group.passive": "every instance serves",
    "instance_group.secondary_devices": "only CPUs and CUDA devices are used",
}

_IGNORED = {
    "instance_group.profile": "profiles are TensorRT's",
    "instance_group.rate_limiter": "nothing is shared that would need it",
    "instance_group.host_policy": "instances are not bound to NUMA nodes",
    "model_metrics": "the metrics are the same for all models",
    "metric_tags": "the metrics are the same for all models",
    "model_warmup": "every batch size is warmed up anyway",
    "optimization": "the server's own settings are used",
    "parameters": "the server's own settings are used",
    "response_cache.enable": "answers are not cached",
    "runtime": "the backend is built in",
}


def check_supported(config: ModelConfig) -> list[str]:
    """Refuse what this server cannot do.

    Returns:
        a warning for each field that has no effect here.

    Raises:
        LoadError: names the field.
    """
    for path, reason in _REFUSED.items():
        if _is_set(config, path):
            raise LoadError(f"'{path}' in the configuration is not supported: {reason}")
    if any(group.kind == ModelInstanceGroup.KIND_MODEL for group in config.instance_group):
        raise LoadError("KIND_MODEL in 'instance_group' is not supported: say KIND_CPU or KIND_GPU")
    return [f"'{path}' has no effect here: {reason}" for path, reason in _IGNORED.items() if _is_set(config, path)]


def _is_set(message: Any, path: str) -> bool:
    """Whether a field, or in any element of a repeated message the field below it, has another value than nothing."""
    name, _, rest = path.partition(".")
    value = getattr(message, name)
    field = message.DESCRIPTOR.fields_by_name[name]
    if field.is_repeated:
        return any(_is_set(item, rest) for item in value) if rest else bool(value)
    if field.message_type is None:
        return bool(value)
    return message.HasField(name) and (not rest or _is_set(value, rest))


# ---- What is completed -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _BackendNames:
    platform: str
    filename: str


_BACKENDS = {
    "onnxruntime": _BackendNames("onnxruntime_onnx", "model.onnx"),
    "pytorch": _BackendNames("pytorch_libtorch", "model.pt"),
}


def complete_backend(config: ModelConfig, version_folder: Path) -> None:
    """Fill in backend, platform and file name, from each other and from the files that there are.

    Raises:
        LoadError: none of ours, or they contradict each other, or the file is missing.
    """
    backend = _chosen_backend(config) or _backend_of_files(config, version_folder)
    config.backend = backend
    config.platform = _BACKENDS[backend].platform
    config.default_model_filename = config.default_model_filename or _BACKENDS[backend].filename
    _check_inside("default_model_filename", config.default_model_filename)
    if not (version_folder / config.default_model_filename).is_file():
        raise LoadError(f"there is no file '{config.default_model_filename}' in version {version_folder.name}")


def _chosen_backend(config: ModelConfig) -> str | None:
    chosen = {config.backend} if config.backend else set()
    if config.platform:
        by_platform = {names.platform: backend for backend, names in _BACKENDS.items()}
        chosen.add(by_platform.get(config.platform, config.platform))
    for backend in chosen - _BACKENDS.keys():
        raise LoadError(f"backend '{backend}' is not supported: this server has {', '.join(_BACKENDS)}")
    if len(chosen) > 1:
        raise LoadError(f"backend '{config.backend}' and platform '{config.platform}' contradict each other")
    return next(iter(chosen), None)


def _backend_of_files(config: ModelConfig, version_folder: Path) -> str:
    for backend, names in _BACKENDS.items():
        filename = config.default_model_filename or names.filename
        if Path(filename).suffix == Path(names.filename).suffix and (version_folder / filename).is_file():
            return backend
    expected = config.default_model_filename or " nor ".join(names.filename for names in _BACKENDS.values())
    raise LoadError(f"there is no {expected} in version {version_folder.name}")


def _check_inside(field: str, filename: str) -> None:
    """The configuration may not reach out of the model's own folder."""
    if Path(filename).is_absolute() or ".." in Path(filename).parts or "\0" in filename:
        raise LoadError(f"'{field}' must stay in its folder, got '{filename}'")


def complete_tensors(config: ModelConfig, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Fill in the inputs and outputs that the configuration leaves out, and with them whether the model batches.

    Args:
        inputs: the model's own, with its batch dimension.

    Raises:
        LoadError: the configuration sets a batch size, and the model has no batch dimension.
    """
    can_batch = all(spec.shape[:1] == (-1,) for spec in (*inputs, *outputs))
    if can_batch and not (config.max_batch_size or config.input or config.output):
        config.max_batch_size = COMPLETED_MAX_BATCH_SIZE
        if config.WhichOneof("scheduling_choice") is None:
            config.dynamic_batching.SetInParent()
    if not config.input:
        config.input.extend(ModelInput(**_tensor_fields(config, spec)) for spec in inputs)
    if not config.output:
        config.output.extend(ModelOutput(**_tensor_fields(config, spec)) for spec in outputs)


def _tensor_fields(config: ModelConfig, spec: TensorSpec) -> dict[str, Any]:
    if config.max_batch_size and spec.shape[:1] != (-1,):
        raise LoadError(
            f"max_batch_size is {config.max_batch_size}, but '{spec.name}' of the model has shape "
            f"{list(spec.shape)}, without a batch dimension in front: set it to 0"
        )
    dims = spec.shape[1:] if config.max_batch_size else spec.shape
    return {"name": spec.name, "data_type": spec.datatype.config_name, "dims": dims}


# ---- The result ------------------------------------------------------------------------------------------------------


def version_policy(config: ModelConfig) -> VersionPolicy:
    """The newest version alone where the configuration does not say otherwise."""
    policy = config.version_policy
    match policy.WhichOneof("policy_choice"):
        case "all":
            return VersionPolicy(num_versions=None)
        case "specific":
            return VersionPolicy(num_versions=None, versions=tuple(policy.specific.versions))
        case _:
            return VersionPolicy(num_versions=policy.latest.num_versions or 1)


def to_spec(config: ModelConfig) -> ModelSpec:
    """The completed configuration, checked.

    Raises:
        LoadError: a value makes no sense.
    """
    if config.max_batch_size < 0:
        raise LoadError(f"max_batch_size must not be negative, got {config.max_batch_size}")
    if not config.version_policy.WhichOneof("policy_choice"):
        config.version_policy.latest.num_versions = 1
    labelled = {output.name: output.label_filename for output in config.output if output.label_filename}
    for filename in labelled.values():
        _check_inside("label_filename", filename)
    batching = config.dynamic_batching
    for rows in batching.preferred_batch_size:
        if not 1 <= rows <= config.max_batch_size:
            raise LoadError(f"a preferred_batch_size must be between 1 and {config.max_batch_size}, got {rows}")
    return ModelSpec(
        name=config.name,
        backend=config.backend,
        platform=config.platform,
        inputs=_tensor_specs("input", config.input, config.max_batch_size),
        outputs=_tensor_specs("output", config.output, config.max_batch_size),
        max_batch_size=config.max_batch_size,
        preferred_rows=max(batching.preferred_batch_size, default=0),
        max_queue_delay_us=batching.max_queue_delay_microseconds,
        max_queue_size=batching.default_queue_policy.max_queue_size,
        timeout_us=batching.default_queue_policy.default_timeout_microseconds,
        version_policy=version_policy(config),
        instances=tuple(_instance_group(group) for group in config.instance_group),
        filename=config.default_model_filename,
        label_files=labelled,
        message=config,
    )


def _tensor_specs(side: str, tensors: Sequence[Any], max_batch_size: int) -> tuple[TensorSpec, ...]:
    by_config_name = {datatype.config_name: datatype for datatype in DATATYPES.values()}
    specs = []
    for tensor in tensors:
        datatype = by_config_name.get(DataType.Name(tensor.data_type) if tensor.data_type in DataType.values() else "")
        if datatype is None:
            expected = ", ".join(sorted(by_config_name))
            raise LoadError(f"{side} '{tensor.name}' needs a data_type out of {expected}")
        if any(dim < 1 and dim != -1 for dim in tensor.dims):
            raise LoadError(f"{side} '{tensor.name}': dims must be positive, or -1 for any, got {list(tensor.dims)}")
        specs.append(TensorSpec(tensor.name, datatype, (*((-1,) if max_batch_size else ()), *tensor.dims)))
    names = [spec.name for spec in specs]
    if not names or "" in names or len(set(names)) != len(names):
        raise LoadError(f"each {side} needs a name of its own, and there must be one: got {names}")
    return tuple(specs)


_KINDS: dict[int, Literal["auto", "cpu", "gpu"]] = {
    ModelInstanceGroup.KIND_AUTO: "auto",
    ModelInstanceGroup.KIND_CPU: "cpu",
    ModelInstanceGroup.KIND_GPU: "gpu",
}


def _instance_group(group: ModelInstanceGroup) -> InstanceGroup:
    if group.count < 0 or min(group.gpus, default=0) < 0:
        raise LoadError(f"'instance_group': count and gpus must not be negative, got {group.count}, {list(group.gpus)}")
    return InstanceGroup(_KINDS[group.kind], group.count or 1, tuple(group.gpus))
