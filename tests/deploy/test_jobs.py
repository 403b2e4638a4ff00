"""The engine kubernetes makes what the overlays have: the same pods, rules and policies, for each kind and for GPUs."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import Object, find, render
from tests.deploy.policy import policy_problems
from tests.deploy.schema import schema_problems
from trainer.service.engines.kubernetes_objects import Identity, as_objects, make_job, read_template, service
from trainer.service.engines.kubernetes_options import Options
from trainer.service.jobs import JobSpec

OPTIONS = {
    "namespace": "convoy",
    "image": "registry.example.com/convoy/trainer:0.2.0",
    "priority-class": "convoy-training",
}
OPTIONS |= {"gpu-image": "registry.example.com/convoy/trainer-gpu:0.2.0"}


def made(kind: str, template: Path | None = None, **values: Any) -> tuple[Object, ...]:
    """Returns the objects of a job with one rank a host, whose arguments are the template's own recipe."""
    options = Options.read(OPTIONS | ({"template": str(template)} if template else {}), {})
    spec = JobSpec(arguments=("--recipe=mnist",), working_folder="/", run_folder="/training/runs/mnist", **values)
    job = make_job(read_template(options), spec, options, Identity("0123456789ab", "17", "1", "ada"))
    return as_objects(job, kind)


def alike(item: Any) -> Any:
    """Returns an object without what differs on purpose: names, labels, the order of variables, the ranks' logs."""
    if isinstance(item, list):
        return [alike(one) for one in item]
    if not isinstance(item, dict):
        return item
    kept = {key: alike(value) for key, value in item.items() if key not in ("metadata", "args", "runtimeRef")}
    if "env" in kept:
        ours = ("PET_LOG_DIR", "PET_TEE", "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE")
        kept["env"] = {entry["name"]: entry for entry in kept["env"] if entry["name"] not in ours}
    for key in ("tolerations", "volumes", "volumeMounts"):
        if key in kept:
            kept[key] = sorted(kept[key], key=lambda one: json.dumps(one, sort_keys=True))
    kept["ports"] = [
        port for port in kept.get("ports", ()) if port["name"] != "metrics"
    ]  # component monitoring-training
    return kept


@pytest.mark.parametrize(
    ("kind", "overlay", "names"),
    [
        ("job", "train-cpu", ["Job/trainer"]),
        ("jobset", "jobset", ["JobSet/trainer"]),
        ("trainjob", "trainer-v2", ["TrainingRuntime/convoy", "TrainJob/trainer"]),
    ],
)
def test_every_kind_is_the_overlays(kind: str, overlay: str, names: list[str]) -> None:
    theirs = [find(render(overlay), name) for name in names]
    ours = made(kind, nodes=(4, 4) if kind == "job" else (2, 2))
    assert [alike(item) for item in ours] == [alike(item) for item in theirs]
    assert schema_problems(ours) == []
    assert policy_problems(ours) == []


@pytest.mark.parametrize(
    ("overlay", "values"),
    [("train-gpu", {"nodes": (2, 2), "gpus": 4}), ("train-elastic", {"nodes": (1, 4)})],
)
def test_gpus_and_elastic_runs_are_the_overlays(overlay: str, values: dict[str, Any]) -> None:
    (ours,) = made("job", **values)
    assert alike(ours) == alike(find(render(overlay), "Job/trainer"))
    assert schema_problems([ours]) == []


def test_an_overlay_is_a_template(tmp_path: Path) -> None:
    (tmp_path / "template.yaml").write_text(yaml.safe_dump_all(render("train-gpu")))
    (ours,) = made("job", tmp_path / "template.yaml", nodes=(2, 2), gpus=4)
    theirs = find(render("train-gpu"), "Job/trainer")
    assert alike(ours) == alike(theirs)
    assert ours["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"
    assert ours["metadata"]["name"] == "convoy-0123456789ab-17-1"


def test_hosts_find_each_other_by_the_service_of_base_trainer() -> None:
    rendered = find(render("train-cpu"), "Service/trainer")
    assert rendered["spec"] == service()["spec"]
