"""GitOps examples, quotas, sharing of GPUs and the local dashboard's files name what exists and have room."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from serving.config import ServeConfig
from tests.deploy.locks import locked
from tests.deploy.manifests import DEPLOY, JOBS, OVERLAYS, Object, build, find, name_of, pod_templates, render
from tests.deploy.policy import PROTECTED

GITOPS = tuple(sorted(DEPLOY.glob("gitops/*/*.yaml")))
UNITS = {"": 1.0, "Gi": 2.0**30, "Ti": 2.0**40, "Mi": 2.0**20}


def amount(text: object) -> float:
    """Returns a Kubernetes quantity as a number."""
    found = re.fullmatch(r"(\d+)(\D*)", str(text))
    assert found, text
    return float(found[1]) * UNITS[found[2]]


def documents(path: Path) -> Iterator[Object]:
    yield from yaml.safe_load_all(path.read_text())


def test_gitops_examples_apply_overlays_that_exist_and_prune_no_data() -> None:
    applied = {}
    for item in (item for path in GITOPS for item in documents(path)):
        spec = item["spec"]
        if item["kind"] == "Application":
            name, prunes = Path(spec["source"]["path"]).name, spec["syncPolicy"]["automated"]["prune"]
            cascades = bool(item["metadata"].get("finalizers"))
        elif item["kind"] == "Kustomization":
            name, prunes, cascades = Path(spec["path"]).name, spec["prune"], spec["prune"]
        else:
            assert item["kind"] == "GitRepository"
            continue
        applied[name, item["kind"]] = (prunes, cascades)
    assert {name for name, _ in applied} <= set(OVERLAYS)
    for (name, _), (prunes, cascades) in applied.items():
        assert (prunes or cascades) == (name != "foundation")


def test_flux_applies_the_foundation_first() -> None:
    items = {item["metadata"]["name"]: item for item in documents(DEPLOY / "gitops/flux/convoy.yaml")}
    for item in items.values():
        spec = item["spec"]
        assert all(other["name"] in items for other in spec.get("dependsOn", ()))
        assert "sourceRef" not in spec or items[spec["sourceRef"]["name"]]["kind"] == spec["sourceRef"]["kind"]
    assert items["convoy-serving"]["spec"]["dependsOn"] == [{"name": "convoy-foundation"}]


def test_only_the_foundation_and_the_laptops_overlays_own_data() -> None:
    held = {
        "Namespace/convoy",
        "Namespace/convoy-dev",
        "PersistentVolumeClaim/models",
        "PersistentVolumeClaim/training",
    }
    owners = {overlay for overlay in OVERLAYS if held & {name_of(item) for item in render(overlay)}}
    assert owners == {"foundation", "dev", "pipeline"}


def test_the_foundation_protects_what_holds_data() -> None:
    held = [item for item in render("foundation") if item["kind"] in ("Namespace", "PersistentVolumeClaim")]
    assert len(held) == 4
    assert all(PROTECTED.items() <= item["metadata"]["annotations"].items() for item in held)


def test_servers_come_before_training() -> None:
    classes = {item["metadata"]["name"]: item for item in render("foundation") if item["kind"] == "PriorityClass"}
    assert classes["convoy-serving"]["value"] > classes["convoy-training"]["value"]
    assert classes["convoy-training"]["preemptionPolicy"] == "Never"
    for overlay in ("prod-cpu", "prod-gpu"):
        (template,) = pod_templates(render(overlay))
        assert template.spec.get("priorityClassName") == "convoy-serving"
    found = {template.owner: template.spec.get("priorityClassName") for template in pod_templates(render("jobs"))}
    assert found == {JOBS: "convoy-serving", "Job/convoy-store-17-1": "convoy-training"}


@pytest.mark.parametrize("overlay", ["prod-cpu", "prod-gpu"])
def test_the_quota_has_room_for_all_servers_beside_a_training_run(overlay: str) -> None:
    quota = find(render("foundation"), "ResourceQuota/convoy")["spec"]["hard"]
    (scaler,) = (
        item["spec"] for item in render(overlay) if item["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")
    )
    most = scaler.get("maxReplicas") or scaler["maxReplicaCount"]
    training = find(render("train-gpu"), "Job/trainer")["spec"]
    needed: dict[str, float] = {}
    deployment = find(render(overlay), "Deployment/serving")["spec"]
    for count, spec in ((most + 1, deployment), (training["completions"], training)):
        for name, value in spec["template"]["spec"]["containers"][0]["resources"]["requests"].items():
            needed[name] = needed.get(name, 0) + count * amount(value)
    for name, value in needed.items():
        assert value <= amount(quota[f"requests.{name}"]), name
    claims = [item["spec"] for item in render("foundation") if item["kind"] == "PersistentVolumeClaim"]
    stored = math.fsum(amount(claim["resources"]["requests"]["storage"]) for claim in claims)
    assert stored <= amount(quota["requests.storage"])


def test_a_slice_takes_the_place_of_the_whole_gpu() -> None:
    resources = find(render("prod-gpu with mig"), "Deployment/serving")["spec"]["template"]["spec"]["containers"][0][
        "resources"
    ]
    assert resources["limits"] == resources["requests"]
    assert [name for name in resources["limits"] if name.startswith("nvidia.com/")] == ["nvidia.com/mig-1g.10gb"]


def test_gpus_that_take_turns_keep_the_name_that_our_pods_request() -> None:
    (item,) = build(DEPLOY / "cluster/gpu-sharing")
    shared = yaml.safe_load(item["data"]["shared"])["sharing"]["timeSlicing"]
    requested = find(render("prod-gpu"), "Deployment/serving")["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert shared["renameByDefault"] is False
    assert {one["name"] for one in shared["resources"]} <= set(requested["limits"])


def test_remote_models_are_copied_into_the_pod_and_only_there() -> None:
    pod = find(render("prod-cpu with remote-models"), "Deployment/serving")["spec"]["template"]["spec"]
    args = pod["containers"][0]["args"]
    assert args[0].startswith("--model-repository=s3://")
    assert "--model-cache=/models" in args
    (volume,) = (volume for volume in pod["volumes"] if volume["name"] == "models")
    assert set(volume) == {"name", "emptyDir"}
    assert "/serving-remote:" in pod["containers"][0]["image"]
    assert "s3fs" in locked(DEPLOY / "docker/serving-remote.lock")


def test_the_driver_that_is_demanded_fits_the_images_libraries() -> None:
    container = find(render("prod-gpu"), "Deployment/serving")["spec"]["template"]["spec"]["containers"][0]
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    (version,) = locked(DEPLOY / "docker/serving-gpu.lock")["nvidia-cuda-runtime"]
    assert values["NVIDIA_REQUIRE_CUDA"] == f"cuda>={version.partition('.')[0]}.0"


@pytest.mark.parametrize("name", ["prod-gpu with everything", "prod-cpu with auth"])
def test_tokens_come_from_a_folder_that_is_updated(name: str) -> None:
    pod = find(render(name), "Deployment/serving")["spec"]["template"]["spec"]
    assert "--token-file=/tokens/tokens" in pod["containers"][0]["args"]
    (mount,) = (mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "tokens")
    assert "subPath" not in mount


def test_the_kserve_overlay_polls_the_claim_that_kserve_mounts() -> None:
    objects = render("kserve")
    runtime, service = find(objects, "ServingRuntime/convoy")["spec"], find(objects, "InferenceService/convoy")["spec"]
    claim = service["predictor"]["model"]["storageUri"].removeprefix("pvc://")
    assert find(render("foundation"), f"PersistentVolumeClaim/{claim}")
    assert "--model-control-mode=poll" in runtime["containers"][0]["args"]
    assert runtime["protocolVersions"] == [service["predictor"]["model"]["protocolVersion"]]
    assert runtime["annotations"]["prometheus.io/port"] == "8002"


def test_the_local_dashboard_mounts_files_that_exist() -> None:
    compose = yaml.safe_load((DEPLOY / "local/compose.yaml").read_text())
    for service in compose["services"].values():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
        for volume in service["volumes"]:
            assert (DEPLOY / "local" / volume.partition(":")[0]).exists(), volume
    scraped = yaml.safe_load((DEPLOY / "local/prometheus.yml").read_text())["scrape_configs"]
    targets = [target for job in scraped for one in job["static_configs"] for target in one["targets"]]
    assert f"127.0.0.1:{ServeConfig(model_repository='models').metrics_port}" in targets
    (source,) = yaml.safe_load((DEPLOY / "local/grafana/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"].removeprefix("http://") in compose["services"]["prometheus"]["command"][1]
