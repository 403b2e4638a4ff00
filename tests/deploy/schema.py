"""Validates objects against strict schemas, in which an unknown field is an error.

Core kinds use Kubernetes' own schemas at the oldest and the newest version that we support; Kubeflow Trainer and JobSet
their typed models; other custom resources the schemas beside this file, which have the fields that we use. Rules that
the API server checks in code or CEL are not covered.
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
from kubeflow_trainer_api import models

from tests.deploy.manifests import Object, name_of

OLDEST, NEWEST = "1.34", "1.37"

MODELS: dict[tuple[str, str], Any] = {
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): models.TrainerV1alpha1TrainJob,
    ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"): models.TrainerV1alpha1TrainingRuntime,
    ("trainer.kubeflow.org/v1alpha1", "ClusterTrainingRuntime"): models.TrainerV1alpha1ClusterTrainingRuntime,
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): models.JobsetV1alpha2JobSet,
}
SCHEMAS = Path(__file__).parent / "schemas"

# Cached: kubernetes-validate rereads several MB of definitions for each object, 50 ms against 5.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)


def schema_problems(objects: Sequence[Object]) -> list[str]:
    """Returns a line for each error in the objects."""
    return [f"{name_of(item)}: {problem}" for item in objects for problem in _validator_of(item)(item)]


def _validator_of(item: Object) -> Callable[[Object], Iterator[str]]:
    if (item["apiVersion"], item["kind"]) in MODELS:
        return _by_model
    return _by_own_schema if (SCHEMAS / f"{item['kind']}.json").exists() else _by_kubernetes


def _by_kubernetes(item: Object) -> Iterator[str]:
    for version in (OLDEST, NEWEST):
        try:
            kubernetes_validate.validate(item, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{version}: {'.'.join(str(part) for part in error.path)}: {error.message}"
        except kubernetes_validate.SchemaNotFoundError:
            yield f"{version}: there is no {item['kind']} in {item['apiVersion']}"


def _by_model(item: Object) -> Iterator[str]:
    """The models drop unknown fields, so the result must equal the input."""
    try:
        known = MODELS[item["apiVersion"], item["kind"]].from_dict(item)
    except ValueError as error:
        yield str(error)
        return
    yield from _differences("", item, json.loads(known.to_json()))


def _differences(path: str, ours: Any, known: Any) -> Iterator[str]:
    if isinstance(ours, dict) and isinstance(known, dict):
        for key, value in ours.items():
            if key in known:
                yield from _differences(f"{path}.{key}", value, known[key])
            elif value != {}:  # the models leave out empty objects
                yield f"{path}.{key}: unknown field"
    elif isinstance(ours, list) and isinstance(known, list) and len(ours) == len(known):
        for index, (one, other) in enumerate(zip(ours, known, strict=True)):
            yield from _differences(f"{path}[{index}]", one, other)
    elif ours != known:
        yield f"{path}: {ours!r} became {known!r}"


def _by_own_schema(item: Object) -> Iterator[str]:
    for error in _own_validator(item["kind"]).iter_errors(item):
        yield f"{'.'.join(str(part) for part in error.path)}: {error.message}"
    if item["kind"] == "ServingRuntime":
        parts = {key: item["spec"][key] for key in ("containers", "volumes") if key in item["spec"]}
        yield from _by_kubernetes({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "runtime"}, "spec": parts})


@functools.cache
def _own_validator(kind: str) -> jsonschema.Draft202012Validator:
    schema = json.loads((SCHEMAS / f"{kind}.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)
