"""A model's configuration: reads Triton's `config.pbtxt` and rejects what this server does not support.

A field that asks for unsupported behaviour is rejected by name. A field without effect is named in a warning.
`serving.models.autocomplete` then fills in what is missing, and `serving.models.spec` checks the values.
"""

import json
from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format

from convoy.images import SIGNIFICANT_BITS
from convoy.preprocessing import PREPROCESSING
from protos.model_config_pb2 import ModelConfig, ModelInstanceGroup
from serving.errors import InvalidArgument, LoadError, TransientLoadError
from serving.models.files import describe, read_text

CONFIG_FILE = "config.pbtxt"

MAX_JSON_CHARACTERS = 64 * 1024
"""Of a configuration that a client sends; parsing as many takes 0.2 s at worst."""


def read_config(folder: Path) -> ModelConfig:
    """Returns the model's `config.pbtxt`, or an empty configuration if there is none.

    Raises:
        TransientLoadError: the file cannot be read.
        LoadError: the file cannot be parsed, or names another model.
    """
    config = ModelConfig()
    try:
        text_format.Parse(read_text(folder / CONFIG_FILE) or "", config)
    except OSError as error:
        raise TransientLoadError(f"{folder.name}/{CONFIG_FILE} cannot be read: {describe(error)}") from error
    except text_format.ParseError as error:
        raise LoadError(f"{folder.name}/{CONFIG_FILE}:{error}") from error
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{folder.name}/{CONFIG_FILE} cannot be read: {error}") from error
    return _with_name(config, folder.name)


def parse_json(text: str, name: str) -> ModelConfig:
    """Returns the configuration that a client sends with a load request, in protobuf's JSON form.

    Raises:
        InvalidArgument: the text is not the JSON of a ModelConfig, or too long.
        LoadError: it names another model.
    """
    if len(text) > MAX_JSON_CHARACTERS:
        expected = f"parameter 'config' must have at most {MAX_JSON_CHARACTERS} characters"
        raise InvalidArgument(f"{expected}, got {len(text)}")
    try:
        document = json.loads(text)
        if not isinstance(document, dict):
            raise ValueError("not an object")
        config = json_format.ParseDict(document, ModelConfig())
    except (json_format.ParseError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"parameter 'config' is not the JSON of a model configuration: {error}") from error
    return _with_name(config, name)


def _with_name(config: ModelConfig, name: str) -> ModelConfig:
    if config.name not in ("", name):
        raise LoadError(f"the configuration's name is '{config.name}', but the model's folder is '{name}'")
    config.name = name
    return config


_REJECTED = {
    "sequence_batching": "the requests of a sequence are not kept together",
    "ensemble_scheduling": "the server runs no ensembles",
    "model_transaction_policy.decoupled": "each request gets exactly one response",
    "dynamic_batching.preserve_ordering": "responses are sent as soon as they are ready",
    "batch_input": "the server generates no inputs",
    "batch_output": "outputs are split by rows only",
    "model_operations": "the server loads no operator libraries",
    "model_repository_agents": "the server runs no repository agents",
    "cc_model_filenames": "one file serves every GPU: use default_model_filename",
    "input.reshape": "set dims to the model's own",
    "input.is_shape_tensor": "the server has no shape tensors",
    "input.allow_ragged_batch": "all rows of a batch have the same shape",
    "input.optional": "every input is required",
    "input.is_non_linear_format_io": "tensors are row-major",
    "output.reshape": "set dims to the model's own",
    "output.is_shape_tensor": "the server has no shape tensors",
    "output.is_non_linear_format_io": "tensors are row-major",
    "instance_group.passive": "every instance serves",
    "instance_group.secondary_devices": "models run on CPUs and CUDA devices only",
}

_IGNORED = {
    "instance_group.profile": "only TensorRT has profiles",
    "instance_group.host_policy": "instances are not bound to NUMA nodes",
    "model_metrics": "all models have the same metrics",
    "metric_tags": "all models have the same metrics",
    "optimization": "the server uses its own settings",
    "parameters": "the server uses its own settings",
    "runtime": "the backend is built in",
}

_WITHOUT_PARAMETERS = ("", "onnxruntime", "onnx", "pytorch", "torchscript", "pt2")
"""Backends that do not read the configuration's `parameters`."""


def check_supported(config: ModelConfig) -> list[str]:
    """Checks that the configuration asks for nothing that this server does not support.

    Returns:
        A warning for each field that has no effect.

    Raises:
        LoadError: a field is not supported; the message names it.
    """
    for path, reason in _REJECTED.items():
        if _is_set(config, path):
            raise LoadError(f"'{path}' in the configuration is not supported: {reason}")
    if any(group.kind == ModelInstanceGroup.KIND_MODEL for group in config.instance_group):
        raise LoadError("KIND_MODEL in 'instance_group' is not supported: use KIND_CPU or KIND_GPU")
    ignored = dict(_IGNORED)
    is_for_clients = set(config.parameters) <= {SIGNIFICANT_BITS, PREPROCESSING}
    if is_for_clients or config.backend not in _WITHOUT_PARAMETERS:
        del ignored["parameters"]
    return [f"'{path}' has no effect: {reason}" for path, reason in ignored.items() if _is_set(config, path)]


def _is_set(message: Any, path: str) -> bool:
    """Returns whether a field is set; in a repeated message, whether any element sets it."""
    name, _, rest = path.partition(".")
    value = getattr(message, name)
    field = message.DESCRIPTOR.fields_by_name[name]
    if field.is_repeated:
        return any(_is_set(item, rest) for item in value) if rest else bool(value)
    if field.message_type is None:
        return bool(value)
    return message.HasField(name) and (not rest or _is_set(value, rest))
