"""Renders manifests with kustomize and finds objects in them. Does not check them."""

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
KUBECTL = Path(sys.executable).parent / "kubectl"

Object = dict[str, Any]

OVERLAYS = tuple(sorted(path.parent.name for path in DEPLOY.glob("overlays/*/kustomization.yaml")))
COMPONENTS = tuple(sorted(path.parent.name for path in DEPLOY.glob("components/*/kustomization.yaml")))
CLUSTER = tuple(sorted(path.parent.name for path in DEPLOY.glob("cluster/*/kustomization.yaml")))

COMPOSITIONS: dict[str, tuple[str, ...]] = {name: (f"overlays/{name}",) for name in OVERLAYS} | {
    # Components that none of our overlays includes: on a base, and first in copies of overlays.
    "serving with gateway": ("base/serving", "base/models", "components/gateway", "components/images"),
    "serving with tls": ("base/serving", "base/models", "components/tls", "components/images"),
    "serving with image-volume": ("base/serving", "components/image-volume", "components/images"),
    "dev with gateway": ("overlays/dev", "components/gateway"),
    "prod-cpu with gateway": ("overlays/prod-cpu", "components/gateway"),
    "prod-cpu with tls": ("overlays/prod-cpu", "components/tls"),
    "prod-gpu with gateway": ("overlays/prod-gpu", "components/gateway", "components/keda/canary"),
    "prod-gpu with everything": (
        *("overlays/prod-gpu", "components/gateway", "components/keda/canary", "components/tls"),
        "components/image-volume",
    ),
}
"""Every combination that an operator would apply at once."""

PATHS = ("resources", "components", "transformers")
"""Fields of a kustomization that name other folders."""


def render(name: str) -> list[Object]:
    """Returns the objects of a composition, as fresh copies."""
    return deepcopy(list(_render(COMPOSITIONS[name])))


@functools.cache
def _render(folders: Sequence[str]) -> tuple[Object, ...]:
    if len(folders) == 1:
        return build(DEPLOY / folders[0])
    fields: Object = {"namespace": "convoy"} | {name: [] for name in PATHS}
    if folders[0].startswith("overlays/"):
        fields |= _fields(folders[0])
        folders = folders[1:]
    parts = {folder: _fields(folder)["kind"] for folder in folders}
    for field, kind in (("components", "Component"), ("resources", "Kustomization")):
        fields[field] = [*(folder for folder, its in parts.items() if its == kind), *fields[field]]
    return render_fields(fields)


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
        elif kind == "ClusterServingRuntime":
            yield PodTemplate(name_of(item), {}, spec)


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


def environment(container: Object, index: int = 0) -> dict[str, str]:
    """Returns a container's variables, as the kubelet sets them in the pod of this completion index."""
    limits = container["resources"]["limits"]
    values = {}
    for entry in container.get("env", ()):
        source = entry.get("valueFrom", {})
        if "value" in entry:
            values[entry["name"]] = entry["value"]
        elif source.get("resourceFieldRef", {}).get("resource") == "limits.cpu":
            values[entry["name"]] = str(limits["cpu"])
        elif "job-completion-index" in source.get("fieldRef", {}).get("fieldPath", ""):
            values[entry["name"]] = str(index)
        else:
            raise AssertionError(f"do not know how to fill in {entry}")
    return values


def arguments(container: Object) -> list[str]:
    """Returns command and arguments, with `$(NAME)` replaced."""
    values = environment(container)
    words = [*container.get("command", ()), *container.get("args", ())]
    for name, value in values.items():
        words = [word.replace(f"$({name})", value) for word in words]
    return words
