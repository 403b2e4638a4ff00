"""Every combination renders, is valid, follows our rules, names only what exists, and would start."""

import json
import tomllib

import pytest
import yaml

from tests.deploy.command_lines import command_line_problems
from tests.deploy.manifests import (
    CLUSTER,
    COMPONENTS,
    COMPOSITIONS,
    DEPLOY,
    OVERLAYS,
    ROOT,
    build,
    find,
    pod_templates,
    render,
)
from tests.deploy.policy import option_text, policy_problems
from tests.deploy.references import reference_problems
from tests.deploy.schema import schema_problems

GIVEN_BY_TRAINER = {f"PET_{name}" for name in ("NNODES", "NPROC_PER_NODE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")}
DEPRECATED = {"bases", "commonLabels", "patchesStrategicMerge", "patchesJson6902", "vars", "imageTags"}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_objects_match_the_schemas(name: str) -> None:
    assert schema_problems(render(name)) == []


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_objects_follow_our_rules(name: str) -> None:
    assert policy_problems(render(name)) == []


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_name_exists(name: str) -> None:
    assert reference_problems(render(name)) == []


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_programs_accept_their_arguments_and_variables(name: str) -> None:
    assert command_line_problems(render(name)) == []


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_names_are_unique(name: str) -> None:
    names = [(item["apiVersion"], item["kind"], item["metadata"]["name"]) for item in render(name)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", CLUSTER)
def test_the_administrators_objects_are_valid(name: str) -> None:
    objects = build(DEPLOY / "cluster" / name)
    assert schema_problems(objects) == []
    assert policy_problems(objects) == []


def test_every_component_is_in_some_composition() -> None:
    texts = [path.read_text() for path in DEPLOY.glob("overlays/*/kustomization.yaml")]
    laid = {folder for folders in COMPOSITIONS.values() for folder in folders}
    unused = [
        name
        for name in COMPONENTS
        if f"components/{name}" not in laid and not any(f"/components/{name}\n" in text for text in texts)
    ]
    assert unused == []


def test_kustomizations_use_no_deprecated_field() -> None:
    for path in DEPLOY.rglob("kustomization.yaml"):
        assert not DEPRECATED & set(yaml.safe_load(path.read_text())), path


def test_image_tags_are_this_projects_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = yaml.safe_load((DEPLOY / "components/images/kustomization.yaml").read_text())["images"]
    assert {image["newTag"] for image in images} == {version}


def test_the_readme_names_every_overlay_and_component() -> None:
    text = (DEPLOY / "README.md").read_text()
    missing = [name for name in (*OVERLAYS, *COMPONENTS) if f"`{name}`" not in text]
    assert missing == []


def test_prod_cpu_names_the_native_transport() -> None:
    args = find(render("prod-cpu"), "Deployment/serving")["spec"]["template"]["spec"]["containers"][0]["args"]
    assert "--transport=native" in args


def test_gpu_requests_devices_for_serving_and_training() -> None:
    serving = find(render("prod-gpu"), "Deployment/serving")["spec"]["template"]["spec"]["containers"][0]
    assert serving["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert serving["image"].startswith("registry.example.com/convoy/serving-gpu")
    trainer = find(render("train-gpu"), "Job/trainer")["spec"]["template"]["spec"]["containers"][0]
    ranks = next(entry["value"] for entry in trainer["env"] if entry["name"] == "PET_NPROC_PER_NODE")
    assert trainer["resources"]["limits"]["nvidia.com/gpu"] == ranks


@pytest.mark.parametrize("name", [name for name in COMPOSITIONS if "everything" in name or "gateway" in name])
def test_the_canary_equals_the_stable_deployment(name: str) -> None:
    objects = render(name)
    stable, canary = (find(objects, f"Deployment/{name}")["spec"] for name in ("serving", "serving-canary"))
    assert json.loads(json.dumps(canary).replace("serving-canary", "serving")) == stable


def test_tls_uses_the_transport_that_supports_it() -> None:
    for name in ("prod-cpu with tls", "serving with tls"):
        container = find(render(name), "Deployment/serving")["spec"]["template"]["spec"]["containers"][0]
        assert option_text(container, "transport") == "grpcio"


def test_kueue_starts_the_job() -> None:
    job = find(render("train-gpu"), "Job/trainer")
    assert job["spec"]["suspend"] is True
    queue = find(render("train-gpu"), "LocalQueue/training")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue["metadata"]["name"]
    known = [item["metadata"]["name"] for item in build(DEPLOY / "cluster/kueue") if item["kind"] == "ClusterQueue"]
    assert queue["spec"]["clusterQueue"] in known


def test_the_pipeline_publishes_into_the_servers_volume() -> None:
    objects = render("pipeline")
    claims = []
    for name in ("Deployment/serving", "Job/trainer"):
        pod = find(objects, name)["spec"]["template"]["spec"]
        mount = next(mount for mount in pod["containers"][0]["volumeMounts"] if mount["mountPath"] == "/models")
        volume = next(volume for volume in pod["volumes"] if volume["name"] == mount["name"])
        claims.append(volume["persistentVolumeClaim"]["claimName"])
        assert "--model-repository=/models" in pod["containers"][0]["args"]
    assert claims == ["models", "models"]


def test_job_jobset_and_trainjob_run_the_same_pod() -> None:
    """The three copies of the pod must stay equal: kustomize cannot move a pod from one kind into another."""
    pods = []
    for name in ("train-cpu", "jobset", "trainer-v2"):
        (template,) = pod_templates(render(name))
        pod = {key: value for key, value in template.spec.items() if key != "subdomain"}
        (container,) = pod["containers"]
        env = [entry for entry in container["env"] if entry["name"] not in GIVEN_BY_TRAINER]
        pods.append({**pod, "containers": [{**container, "name": "", "env": env}]})
    assert pods[0] == pods[1] == pods[2]


def test_job_jobset_and_trainjob_have_the_same_failure_policy() -> None:
    job = find(render("train-cpu"), "Job/trainer")["spec"]
    job_set = find(render("jobset"), "JobSet/trainer")["spec"]
    runtime = find(render("trainer-v2"), "TrainingRuntime/convoy")["spec"]["template"]["spec"]
    specs = [job, *(gang["replicatedJobs"][0]["template"]["spec"] for gang in (job_set, runtime))]
    policies = [json.dumps(spec["podFailurePolicy"]).replace('"node"', '"trainer"') for spec in specs]
    assert policies[0] == policies[1] == policies[2]
