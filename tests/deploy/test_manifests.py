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
    SETTINGS,
    build,
    find,
    render,
)
from tests.deploy.policy import option_text, policy_problems
from tests.deploy.references import reference_problems
from tests.deploy.schema import schema_problems

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
    assert SETTINGS["tag"] == SETTINGS["canary-tag"] == version


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
