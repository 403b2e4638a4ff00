"""Renders manifests with kustomize and finds objects in them. Does not check them."""

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.service.engines.kubernetes_objects import Identity, make_job, read_template
from trainer.service.engines.kubernetes_options import Options
from trainer.service.jobs import JobSpec

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
KUBECTL = Path(sys.executable).parent / "kubectl"

JOBS = "Deployment/jobs"
"""The training service: one replica, which calls the Kubernetes API. Jobs go on without it."""
KSERVE = "serving.kserve.io/inferenceservice"
"""The label that KServe puts on a service's pods."""

Object = dict[str, Any]

OVERLAYS = tuple(sorted(path.parent.name for path in DEPLOY.glob("overlays/*/kustomization.yaml")))
COMPONENTS = tuple(sorted(path.parent.name for path in DEPLOY.glob("components/*/kustomization.yaml")))
CLUSTER = tuple(sorted(path.parent.name for path in DEPLOY.glob("cluster/*/kustomization.yaml")))

COMPOSITIONS: dict[str, tuple[str, ...]] = {name: (f"overlays/{name}",) for name in OVERLAYS} | {
    # Components that none of our overlays includes: on a base, and first in copies of overlays.
    "serving with gateway": ("settings", "base/serving", "components/gateway", "components/settings"),
    "serving with tls": ("settings", "base/serving", "components/tls", "components/settings"),
    "serving with image-volume": ("settings", "base/serving", "components/image-volume", "components/settings"),
    "dev with gateway": ("overlays/dev", "components/gateway"),
    "prod-cpu with gateway": ("overlays/prod-cpu", "components/gateway"),
    "prod-cpu with tls": ("overlays/prod-cpu", "components/tls"),
    "prod-cpu with auth": ("overlays/prod-cpu", "components/auth", "components/pull-secret"),
    "pipeline with arm64": ("overlays/pipeline", "components/arm64"),
    "prod-cpu with remote-models": ("overlays/prod-cpu", "components/remote-models"),
    "jobs with monitoring": ("overlays/jobs", "components/monitoring-jobs", "components/pull-secret"),
    "prod-gpu with mig": ("overlays/prod-gpu", "after", "components/mig", "components/runtime-class"),
    "train-cpu with spot": ("overlays/train-cpu", "components/spot"),
    "train-gpu with rdma": ("overlays/train-gpu", "after", "components/rdma", "components/runtime-class"),
    "jobset-gpu with rdma": ("overlays/jobset-gpu", "after", "components/rdma", "components/spot"),
    "prod-gpu with gateway": ("overlays/prod-gpu", "components/gateway", "components/keda/canary"),
    "prod-gpu with everything": (
        *("overlays/prod-gpu", "components/gateway", "components/keda/canary", "components/tls"),
        *("components/auth", "components/image-volume"),
    ),
}
"""Every combination that an operator would apply at once: a copy of an overlay with more components, before its own or,
from "after" on, before the last, `settings`."""

SETTINGS = dict(
    line.split("=", 1)
    for line in (DEPLOY / "settings/settings.env").read_text().splitlines()
    if not line.startswith("#") and line
)
"""A user's values, before an overlay merges its own."""

PATHS = ("resources", "components", "transformers")
"""Fields of a kustomization that name other folders."""


def render(name: str) -> list[Object]:
    """Returns the objects of a composition, as fresh copies."""
    objects = deepcopy(list(_render(COMPOSITIONS[name])))
    return [*objects, *made_by_the_service(objects)]


def made_by_the_service(objects: Sequence[Object]) -> list[Object]:
    """Returns what the training service makes of a job, if the objects have a training service."""
    for container in (template.spec["containers"][0] for template in pod_templates(objects) if template.owner == JOBS):
        options = Options.read({"namespace": "convoy"}, environment(container))
        folder = f"{container['workingDir']}/runs/job-17"
        spec = JobSpec(arguments=("--recipe", "cifar10"), nodes=(2, 2), gpus=4, working_folder="/", run_folder=folder)
        return [make_job(read_template(options), spec, options, Identity("store", "17", "1", "ada"))]
    return []


@functools.cache
def _render(folders: Sequence[str]) -> tuple[Object, ...]:
    return build(DEPLOY / folders[0]) if len(folders) == 1 else render_fields(fields_of(folders))


def fields_of(folders: Sequence[str]) -> Object:
    """Returns a composition's kustomization, with paths relative to DEPLOY."""
    fields: Object = {"namespace": "convoy"} | {name: [] for name in PATHS}
    if folders[0].startswith("overlays/"):
        fields |= _fields(folders[0])
        folders = folders[1:]
    place = 0
    for folder in folders:
        if folder == "after":
            place = len(fields["components"]) - 1
        elif _fields(folder)["kind"] == "Component":
            fields["components"].insert(place, folder)
            place += 1
        else:
            fields["resources"].append(folder)
    return fields


def _fields(folder: str) -> Object:
    """Returns a folder's kustomization, with paths relative to DEPLOY."""
    fields: Object = yaml.safe_load((DEPLOY / folder / "kustomization.yaml").read_text())
    return fields | {name: [os.path.normpath(f"{folder}/{path}") for path in fields.get(name, ())] for name in PATHS}


def render_fields(fields: Object) -> tuple[Object, ...]:
    """Renders a kustomization with these fields; paths are relative to DEPLOY."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        moved = {name: [os.path.relpath(DEPLOY / path, folder) for path in fields[name]] for name in PATHS}
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(fields | moved))
        return build(folder)


def build(folder: Path) -> tuple[Object, ...]:
    """Runs `kubectl kustomize`, and fails if it warns."""
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


@dataclass(frozen=True)
class PodTemplate:
    """The pods that an object creates.

    Args:
        owner: `Kind/name`.
        labels: include those that the API server or a controller adds.
        spec: the pod's, or a ServingRuntime's own, because it has no template.
    """

    owner: str
    labels: dict[str, str]
    spec: Object


def name_of(item: Object) -> str:
    """Returns `Kind/name`."""
    return f"{item['kind']}/{item['metadata']['name']}"


def find(objects: Sequence[Object], name: str) -> Object:
    """Returns the object `Kind/name`."""
    return next(item for item in objects if name_of(item) == name)


def pod_templates(objects: Sequence[Object]) -> Iterator[PodTemplate]:
    """Yields all pods that the objects create, through any controller."""
    for item in objects:
        kind, name, spec = item["kind"], item["metadata"]["name"], item.get("spec", {})
        if kind == "Deployment":
            yield _template(item, spec["template"])
        elif kind == "Job":
            yield _template(item, spec["template"], {"batch.kubernetes.io/job-name": name})
        elif kind == "JobSet":
            yield from _replicated(item, spec, name)
        elif kind == "TrainingRuntime":
            for train_job in (other for other in objects if other["kind"] == "TrainJob"):
                yield from _replicated(item, spec["template"]["spec"], train_job["metadata"]["name"])
        elif kind == "ServingRuntime":
            for service in (other for other in objects if other["kind"] == "InferenceService"):
                yield PodTemplate(name_of(item), {KSERVE: service["metadata"]["name"]}, spec)


def _replicated(item: Object, spec: Object, job_set: str) -> Iterator[PodTemplate]:
    for job in spec["replicatedJobs"]:
        yield _template(item, job["template"]["spec"]["template"], {"jobset.sigs.k8s.io/jobset-name": job_set})


def _template(item: Object, template: Object, added: dict[str, str] | None = None) -> PodTemplate:
    labels = template.get("metadata", {}).get("labels", {})
    return PodTemplate(name_of(item), {**labels, **(added or {})}, template["spec"])


def matches(selector: Object, labels: dict[str, str]) -> bool:
    """Returns whether a LabelSelector matches, for the operators that we use."""
    equal = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    return equal and all(_holds(rule, labels) for rule in selector.get("matchExpressions", ()))


def _holds(rule: Object, labels: dict[str, str]) -> bool:
    assert rule["operator"] == "In", rule
    return labels.get(rule["key"]) in rule["values"]


def environment(
    container: Object, index: int = 0, *, job: str = "trainer", address: str = "127.0.0.1"
) -> dict[str, str]:
    """Returns a container's variables, as the kubelet sets them in the pod of this completion index of a Job."""
    limits = container["resources"]["limits"]
    fields = {
        "metadata.annotations['batch.kubernetes.io/job-completion-index']": str(index),
        "metadata.labels['batch.kubernetes.io/job-name']": job,
        "status.podIP": address,
    }
    values: dict[str, str] = {}
    for entry in container.get("env", ()):
        source = entry.get("valueFrom", {})
        if "value" in entry:
            values[entry["name"]] = _expand(entry["value"], values)
        elif source.get("resourceFieldRef", {}).get("resource") == "limits.cpu":
            values[entry["name"]] = str(limits["cpu"])
        elif source.get("fieldRef", {}).get("fieldPath") in fields:
            values[entry["name"]] = fields[source["fieldRef"]["fieldPath"]]
        else:
            raise AssertionError(f"do not know how to fill in {entry}")
    return values


def arguments(container: Object) -> list[str]:
    """Returns command and arguments, with `$(NAME)` replaced."""
    values = environment(container)
    return [_expand(word, values) for word in (*container.get("command", ()), *container.get("args", ()))]


def _expand(text: str, values: Mapping[str, str]) -> str:
    """Replaces `$(NAME)` by the variables that are defined before."""
    for name, value in values.items():
        text = text.replace(f"$({name})", value)
    return text
