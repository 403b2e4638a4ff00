"""One file holds a user's values: each setting reaches some object, also from an overlay on top."""

import json

import pytest

from tests.deploy.manifests import OVERLAYS, SETTINGS, Object, find, render, render_fields

MORE = {
    "prod-cpu": ["components/remote-models"],
    "prod-gpu": ["components/gateway", "components/image-volume"],
}
"""Components with settings of their own that no overlay includes."""


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
    for overlay in OVERLAYS:
        shown += json.dumps(on_top([f"overlays/{overlay}"], MORE.get(overlay, []), **marks))
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
