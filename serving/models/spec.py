"""`ModelSpec`: a completed configuration, checked and in the server's own types. Knows no backend and reads no file."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from convoy.promotion import Promotion
from protos.model_config_pb2 import DataType, ModelConfig, ModelDynamicBatching, ModelInstanceGroup, ModelQueuePolicy
from serving.errors import LoadError
from serving.inference.queue_policy import QueuePolicies, QueuePolicy
from serving.inference.rate_limiter import Resource
from serving.models.devices import InstanceGroup
from serving.protocol.tensors import DATATYPES, TensorSpec

MAX_PRIORITY_LEVELS = 100


@dataclass(frozen=True, slots=True)
class VersionPolicy:
    """Selects the versions of a model to serve.

    Args:
        num_versions: how many of the newest; None for no limit.
        versions: the only versions to serve; None for any.
    """

    num_versions: int | None = 1
    versions: tuple[int, ...] | None = None

    def candidates(self, present: Iterable[int], promotion: Promotion | None = None) -> list[int]:
        """Returns the versions to try, newest first. A listed or promoted version is tried even if it is not present.

        Args:
            promotion: orders the versions, and leaves out those that it replaces if their number is limited.
        """
        allowed = sorted(present if self.versions is None else self.versions, reverse=True)
        if promotion is None:
            return allowed
        ordered = [
            version
            for version in promotion.order(allowed)
            if version in allowed or (self.versions is None and version == promotion.version)
        ]
        return ordered if self.num_versions is not None else list(dict.fromkeys([*ordered, *allowed]))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The configuration of a model version.

    Args:
        backend: Triton's name, such as "onnxruntime" or "pytorch"; or that of another package's entry point.
        platform: Triton's older name, such as "onnxruntime_onnx" or "torch_aoti"; empty if the backend has none.
        inputs: if the model batches, each shape begins with the batch dimension, -1.
        outputs: as the inputs.
        max_batch_size: rows; 0 for a model without a batch dimension.
        preferred_batch_size: the largest of `dynamic_batching.preferred_batch_size`; 0 if there is none.
        max_queue_delay_us: how long a request may wait for others to join its batch.
        max_queue_size: requests; 0 for the server's default.
        timeout_us: how long a request may wait in the queue; 0 for no limit.
        policies: of the priorities; None for a queue of one level that refuses what waits too long.
        instances: empty for the default: one on each GPU, or else one on the CPU.
        filename: the model file, in the version's folder.
        label_files: label files in the model's folder, by the name of their output.
        config: the completed configuration as a protobuf message.
    """

    name: str
    backend: str
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int
    preferred_batch_size: int
    max_queue_delay_us: int
    max_queue_size: int
    timeout_us: int
    policies: QueuePolicies | None = None
    version_policy: VersionPolicy
    instances: tuple[InstanceGroup, ...]
    filename: str
    label_files: Mapping[str, str]
    config: ModelConfig


def to_spec(config: ModelConfig) -> ModelSpec:
    """Converts a completed configuration.

    Raises:
        LoadError: a value is invalid.
    """
    if config.max_batch_size < 0:
        raise LoadError(f"max_batch_size must not be negative, got {config.max_batch_size}")
    if not config.version_policy.WhichOneof("policy_choice"):
        config.version_policy.latest.num_versions = 1
    label_files = {output.name: output.label_filename for output in config.output if output.label_filename}
    for filename in label_files.values():
        check_inside("label_filename", filename)
    batching = config.dynamic_batching
    for rows in batching.preferred_batch_size:
        if not 1 <= rows <= config.max_batch_size:
            raise LoadError(f"preferred_batch_size must be between 1 and {config.max_batch_size}, got {rows}")
    return ModelSpec(
        name=config.name,
        backend=config.backend,
        platform=config.platform,
        inputs=_tensor_specs("input", config.input, config.max_batch_size),
        outputs=_tensor_specs("output", config.output, config.max_batch_size),
        max_batch_size=config.max_batch_size,
        preferred_batch_size=max(batching.preferred_batch_size, default=0),
        max_queue_delay_us=batching.max_queue_delay_microseconds,
        max_queue_size=batching.default_queue_policy.max_queue_size,
        timeout_us=batching.default_queue_policy.default_timeout_microseconds,
        policies=_queue_policies(batching),
        version_policy=version_policy(config),
        instances=tuple(_instance_group(group) for group in config.instance_group),
        filename=config.default_model_filename,
        label_files=label_files,
        config=config,
    )


def _queue_policies(batching: ModelDynamicBatching) -> QueuePolicies | None:
    levels, default = batching.priority_levels, batching.default_priority_level
    if levels > MAX_PRIORITY_LEVELS:
        raise LoadError(f"priority_levels must be at most {MAX_PRIORITY_LEVELS}, got {levels}")
    if (levels and not 1 <= default <= levels) or (default and not levels):
        raise LoadError(f"default_priority_level must be between 1 and priority_levels, {levels}, got {default}")
    for priority in batching.priority_queue_policy:
        if not 1 <= priority <= levels:
            raise LoadError(f"priority_queue_policy must be of priorities from 1 to {levels}, got {priority}")
    own = {priority: _queue_policy(policy) for priority, policy in batching.priority_queue_policy.items()}
    other = _queue_policy(batching.default_queue_policy)
    if not levels and not other.interprets_timeout:
        return None
    return QueuePolicies(tuple(own.get(place + 1, other) for place in range(levels or 1)), max(0, default - 1))


def _queue_policy(policy: ModelQueuePolicy) -> QueuePolicy:
    return QueuePolicy(
        policy.max_queue_size,
        policy.default_timeout_microseconds,
        delays=policy.timeout_action == ModelQueuePolicy.DELAY,
        allows_override=policy.allow_timeout_override,
    )


def check_values(config: ModelConfig) -> None:
    """Checks a configuration that lists its tensors, whatever its backend.

    Raises:
        LoadError: a value is invalid.
    """
    copy = ModelConfig()
    copy.CopyFrom(config)
    to_spec(copy)


def version_policy(config: ModelConfig) -> VersionPolicy:
    """Returns the configuration's version policy; by default, the newest version alone."""
    policy = config.version_policy
    match policy.WhichOneof("policy_choice"):
        case "all":
            return VersionPolicy(num_versions=None)
        case "specific":
            return VersionPolicy(num_versions=None, versions=tuple(policy.specific.versions))
        case _:
            return VersionPolicy(num_versions=policy.latest.num_versions or 1)


def check_inside(field: str, filename: str) -> None:
    """Checks that a configured file name does not lead out of the model's folder.

    Raises:
        LoadError: the name is absolute or contains "..".
    """
    if Path(filename).is_absolute() or ".." in Path(filename).parts or "\0" in filename:
        raise LoadError(f"'{field}' must stay in its folder, got '{filename}'")


def _tensor_specs(side: str, tensors: Sequence[Any], max_batch_size: int) -> tuple[TensorSpec, ...]:
    by_config_name = {datatype.config_name: datatype for datatype in DATATYPES.values()}
    specs = []
    for tensor in tensors:
        datatype = by_config_name.get(DataType.Name(tensor.data_type) if tensor.data_type in DataType.values() else "")
        if datatype is None:
            expected = ", ".join(sorted(by_config_name))
            raise LoadError(f"{side} '{tensor.name}': data_type must be one of {expected}")
        if any(dim < 1 and dim != -1 for dim in tensor.dims):
            raise LoadError(
                f"{side} '{tensor.name}': dims must be positive, or -1 for any size, got {list(tensor.dims)}"
            )
        specs.append(TensorSpec(tensor.name, datatype, (*((-1,) if max_batch_size else ()), *tensor.dims)))
    names = [spec.name for spec in specs]
    if not names or "" in names or len(set(names)) != len(names):
        raise LoadError(f"a model needs at least one {side}, and each needs a unique name: got {names}")
    return tuple(specs)


_KINDS: dict[int, Literal["auto", "cpu", "gpu"]] = {
    ModelInstanceGroup.KIND_AUTO: "auto",
    ModelInstanceGroup.KIND_CPU: "cpu",
    ModelInstanceGroup.KIND_GPU: "gpu",
}


def _instance_group(group: ModelInstanceGroup) -> InstanceGroup:
    if group.count < 0 or min(group.gpus, default=0) < 0:
        raise LoadError(f"'instance_group': count and gpus must not be negative, got {group.count}, {list(group.gpus)}")
    limiter = group.rate_limiter
    return InstanceGroup(
        _KINDS[group.kind],
        group.count or 1,
        tuple(group.gpus),
        tuple(Resource(each.name, each.count, getattr(each, "global")) for each in limiter.resources),
        limiter.priority or 1,
    )
