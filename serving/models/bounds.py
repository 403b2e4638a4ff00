"""What a configuration may ask for: memory and threads for a model, whose amounts a client must not choose freely.

A configuration that a client sends is refused beyond these bounds, unless the model's own `config.pbtxt` asks for as
much. That file is the operator's: it is followed, with a warning.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convoy.cpus import num_available_cpus
from protos.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup
from serving.errors import InvalidArgument, LoadError
from serving.models.config import check_supported, parse_json, read_config
from serving.models.devices import count_gpus
from serving.models.spec import check_values
from serving.protocol.tensors import DATATYPES

_MAX_BATCH_SIZE = 1024
_MAX_BATCH_BYTES = 1 << 30
_MAX_QUEUE_DELAY_US = 1_000_000
_MAX_INSTANCES = 8
_MAX_VERSIONS = 64
_MAX_WARMUP_RUNS = 100
_UNBOUNDED = 2**63


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of this server.

    Args:
        max_queue_size: the operator's, for models whose configuration sets none.
    """

    max_queue_size: int

    def check(self, config: ModelConfig, own: ModelConfig) -> None:
        """Checks the configuration that a client sends.

        Args:
            own: the model's `config.pbtxt`.

        Raises:
            InvalidArgument: it asks for more than the bounds and `own` allow; the message names the field.
        """
        allowed = _demands(own)
        for field, value in _demands(config).items():
            bound = max(self._bounds()[field], allowed[field])
            if value > bound:
                asked = f"parameter 'config' asks for {value} as {field}"
                raise InvalidArgument(f"{asked}: at most {bound} is allowed, or what the model's config.pbtxt has")

    def check_json(self, override: str, folder: Path) -> None:
        """Checks the configuration that a client sends as JSON for the model in a folder.

        Raises:
            InvalidArgument: it is invalid, or asks for too much.
        """
        try:
            config = parse_json(override, folder.name)
            check_supported(config)
            if config.input and config.output:
                check_values(config)
        except LoadError as error:
            raise InvalidArgument(str(error)) from error
        try:
            own = read_config(folder)
        except LoadError:
            own = ModelConfig()  # the bounds hold as they are
        self.check(config, own)

    def warnings(self, own: ModelConfig) -> list[str]:
        """Returns a warning for each bound that a `config.pbtxt` exceeds. Its queue may have any size."""
        bounds = {**self._bounds(), "max_queue_size": _UNBOUNDED}
        demands = _demands(own).items()
        return [f"config.pbtxt asks for {value} as {field}" for field, value in demands if value > bounds[field]]

    def _bounds(self) -> Mapping[str, int]:
        return {
            "max_batch_size": _MAX_BATCH_SIZE,
            "bytes of the largest batch": _MAX_BATCH_BYTES,
            "max_queue_delay_microseconds": _MAX_QUEUE_DELAY_US,
            "max_queue_size": self.max_queue_size,
            "instances on one device": max(_MAX_INSTANCES, num_available_cpus()),
            "number of versions": _MAX_VERSIONS,
            "runs of model_warmup": _MAX_WARMUP_RUNS,
            "bytes of model_warmup": _MAX_BATCH_BYTES,
        }


def _demands(config: ModelConfig) -> dict[str, int]:
    """Returns what a configuration asks for, by the names of the bounds."""
    batching = config.dynamic_batching
    return {
        "max_batch_size": config.max_batch_size,
        "bytes of the largest batch": max(1, config.max_batch_size) * _num_bytes((*config.input, *config.output)),
        "max_queue_delay_microseconds": batching.max_queue_delay_microseconds,
        "max_queue_size": max(
            policy.max_queue_size
            for policy in (batching.default_queue_policy, *batching.priority_queue_policy.values())
        ),
        "instances on one device": _instances_on_one_device(config),
        "number of versions": len(config.version_policy.specific.versions),
        "runs of model_warmup": sum(max(1, sample.count) for sample in config.model_warmup),
        "bytes of model_warmup": sum(
            max(1, sample.batch_size) * _num_bytes(sample.inputs.values()) for sample in config.model_warmup
        ),
    }


def _num_bytes(tensors: Iterable[Any]) -> int:
    """Returns the bytes of tensors as configured. Counts an open size as 1, and no further than any bound."""
    sizes = {datatype.config_name: max(1, datatype.size) for datatype in DATATYPES.values()}
    names = dict(zip(DataType.values(), DataType.keys(), strict=True))
    total = 0
    for tensor in tensors:
        size = sizes.get(names.get(tensor.data_type, ""), 1)
        for dim in tensor.dims:
            size *= max(1, dim)
            if size > _UNBOUNDED:
                return _UNBOUNDED
        total += size
    return total


def _instances_on_one_device(config: ModelConfig) -> int:
    """Returns the largest number of instances on one device, without making a list of them."""
    instances: Counter[int | None] = Counter()
    for group in config.instance_group:
        on_cpu = group.kind == ModelInstanceGroup.KIND_CPU or not count_gpus()
        for device in [None] if on_cpu else group.gpus or range(count_gpus()):
            instances[device] += max(1, group.count)
    return max(instances.values(), default=1)
