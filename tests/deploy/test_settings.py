"""One file holds a user's values: each setting reaches some object, also from an overlay on top."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.manifests import DEPLOY, OVERLAYS, SETTINGS, Object, build, find, render, render_fields
from tests.deploy.policy import policy_problems

REACHED: dict[str, list[str]] = {
    "foundation": [],
    "prod-cpu": ["components/remote-models"],
    "prod-gpu": ["components/gateway", "components/image-volume"],
    "train-gpu": [],
    "train-elastic": [],
}
"""Overlays that have all settings between them, with components that none of ours includes."""


def on_top(resources: list[str], components: list[str], **values: str) -> tuple[Object, ...]:
    """Renders an overlay as a user writes it, with values of its own."""
    literals = [f"{key.replace('_', '-')}={value}" for key, value in values.items()]
    generator = {"name": "settings", "behavior": "merge", "literals": literals}
    return render_fields(
        {
            "namespace": "convoy",
            "resources": resources,
            "components": [*components, "components/settings"],
            "transformers": [],
            "configMapGenerator": [generator],
        }
    )


def test_every_setting_reaches_an_object() -> None:
    kept = enumerate(SETTINGS.items())
    marks = {key: str(4000 + i) if value.isdigit() else f"changed-{key}" for i, (key, value) in kept}
    shown = ""
    for overlay, components in REACHED.items():
        shown += json.dumps(on_top([f"overlays/{overlay}"], components, **marks))
    assert [key for key, mark in marks.items() if mark not in shown] == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_settings_themselves_never_reach_the_cluster(overlay: str) -> None:
    names = {item["metadata"]["name"] for item in render(overlay) if item["kind"] == "ConfigMap"}
    assert not {"settings", "images"} & names


def test_applying_the_settings_again_changes_nothing() -> None:
    """An overlay on top of ours, also of a remote one, lists the component again."""
    assert on_top(["overlays/prod-cpu"], [], tag=SETTINGS["tag"]) == tuple(render("prod-cpu"))


def test_a_registry_with_a_port_and_folders_and_a_digest() -> None:
    digest = "0.3.0@sha256:" + 64 * "a"
    objects = on_top(["overlays/prod-gpu"], [], registry="r.example.com:5000/a/b", tag=digest)
    container = find(objects, "Deployment/serving")["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == f"r.example.com:5000/a/b/serving-gpu:{digest}"


def test_the_canary_has_a_tag_and_a_least_number_of_its_own() -> None:
    overlay = "prod-cpu with gateway"
    scalers = {name: find(render(overlay), f"HorizontalPodAutoscaler/{name}") for name in ("serving", "serving-canary")}
    assert [scaler["spec"]["minReplicas"] for scaler in scalers.values()] == [3, 1]
    objects = on_top(["overlays/prod-cpu"], ["components/gateway"], canary_tag="0.3.0")
    images = [
        find(objects, f"Deployment/{name}")["spec"]["template"]["spec"]["containers"][0]["image"] for name in scalers
    ]
    assert [image.rpartition(":")[2] for image in images] == [SETTINGS["tag"], "0.3.0"]


def test_the_canarys_share_is_a_setting() -> None:
    objects = on_top(["overlays/prod-cpu"], ["components/gateway"], stable_weight="95", canary_weight="5")
    (rule,) = find(objects, "GRPCRoute/serving")["spec"]["rules"]
    assert {ref["name"]: ref["weight"] for ref in rule["backendRefs"]} == {"serving": 95, "serving-canary": 5}


def test_the_guides_overlay_on_a_remote_base_renders(tmp_path: Path) -> None:
    """Fetched by git, as kubectl fetches it, from a repository that a tag names."""
    repository = tmp_path / "convoy"
    shutil.copytree(DEPLOY, repository / "deploy")
    author = ("-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false")
    for words in (["init", "--quiet"], ["add", "."], [*author, "commit", "--quiet", "-m", "Test"], ["tag", "v0.2.0"]):
        subprocess.run(["git", *words], cwd=repository, check=True, timeout=60)
    guide = (DEPLOY / "README.md").read_text()
    (example,) = (block for block in re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL) if "?ref=" in block)
    (tmp_path / "mine").mkdir()
    text = example.replace("https://git.example.com/platform/convoy", f"file://{repository}")
    (tmp_path / "mine/kustomization.yaml").write_text(text)
    objects = build(tmp_path / "mine")
    assert policy_problems(objects) == []
    container = find(objects, "Deployment/serving")["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == "ghcr.io/acme/serving:0.2.0"
    assert find(objects, "HorizontalPodAutoscaler/serving")["spec"]["maxReplicas"] == 40
