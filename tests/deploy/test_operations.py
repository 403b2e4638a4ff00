"""What would go wrong only in operation: an older kubectl, a slow store, others' alerts, a dashboard left behind."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import DEPLOY, Object, find, render, render_fields
from tests.deploy.policy import policy_problems


def selects(item: Any) -> Iterator[Object]:
    """Yields what the replacements in a document select."""
    if isinstance(item, list):
        for one in item:
            yield from selects(one)
    elif isinstance(item, dict):
        if "select" in item:
            yield item["select"]
        yield from selects(list(item.values()))


def test_replacements_select_by_plain_words() -> None:
    """kubectl 1.32 takes kinds and names literally there: a regular expression would silently match nothing."""
    found = [
        value
        for path in DEPLOY.rglob("*.yaml")
        for document in yaml.safe_load_all(path.read_text())
        for select in selects(document)
        for key, value in select.items()
        if key in ("kind", "name")
    ]
    assert len(found) > 20
    assert [value for value in found if not value.replace("-", "").isalnum()] == []


@pytest.mark.parametrize("name", ["prod-cpu", "train-gpu"])
def test_a_dashboard_keeps_its_name(name: str) -> None:
    """Grafana's sidecar shows each ConfigMap with the label: one under the name of an older content would stay."""
    names = {item["metadata"]["name"] for item in render(name) if item["kind"] == "ConfigMap"}
    assert names in ({"convoy-dashboard"}, {"convoy-training-dashboard"})


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("grafana-dashboard.json")), ids=lambda path: path.parent.name)
def test_a_strangers_look_at_a_dashboard(path: Path) -> None:
    """Each panel has a unit and says what it means to be empty, and no two share a place; rows head the sections."""
    panels = json.loads(path.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    assert panels[0]["type"] == "row"
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
        defaults = panel.get("fieldConfig", {"defaults": None})["defaults"]
        assert panel["type"] == "row" or (defaults["unit"] != "none" and defaults["noValue"]), panel["title"]


def test_success_is_green_and_failures_are_red() -> None:
    panels = json.loads((DEPLOY / "monitoring/grafana-dashboard.json").read_text())["panels"]
    (panel,) = (panel for panel in panels if panel["title"] == "Requests by outcome")
    overrides = panel["fieldConfig"]["overrides"]
    colours = {one["matcher"]["options"]: one["properties"][0]["value"]["fixedColor"] for one in overrides}
    assert colours.keys() == {"success", "rejected", "canceled", "backend", "other"}
    assert (colours["success"], colours["backend"], colours["other"]) == ("green", "red", "dark-red")


def test_an_alert_about_all_servers_of_the_cluster_is_caught() -> None:
    objects = render("prod-cpu")
    rules = find(objects, "PrometheusRule/convoy")["spec"]["groups"][0]["rules"]
    next(rule for rule in rules if rule["alert"] == "ConvoyServerDown")["expr"] = 'up{job=~".*/serving"} == 0'
    assert policy_problems(objects) == ["PrometheusRule/convoy: ConvoyServerDown asks about all namespaces"]


def test_a_cells_alerts_are_about_itself() -> None:
    fields = {"namespace": "cell-2", "resources": ["overlays/prod-gpu"], "components": []}
    objects = render_fields(fields | {"transformers": ["monitoring/namespace"]})
    assert policy_problems(objects) == []
    rules = [rule for group in find(objects, "PrometheusRule/convoy")["spec"]["groups"] for rule in group["rules"]]
    assert all('namespace="cell-2"' in rule["expr"] and 'namespace="convoy"' not in rule["expr"] for rule in rules)


def test_a_teams_service_of_jobs_gets_its_own_rights() -> None:
    fields = {"namespace": "team-b", "resources": ["overlays/jobs"], "components": [], "transformers": []}
    objects = [*render_fields(fields)]
    assert policy_problems(objects) == []
    find(objects, "RoleBinding/jobs")["subjects"][0]["namespace"] = "convoy"
    assert policy_problems(objects) == ["RoleBinding/jobs: gives rights to an account of another namespace"]


def test_a_server_that_copies_its_models_has_time_for_it() -> None:
    objects = render("prod-cpu with remote-models")
    container = find(objects, "Deployment/serving")["spec"]["template"]["spec"]["containers"][0]
    del container["startupProbe"]["failureThreshold"]
    (problem,) = policy_problems(objects)
    assert "has 6 s for its first copy" in problem


def test_a_policy_that_forgets_the_nodes_own_dns_is_caught() -> None:
    objects = render("jobs")
    find(objects, "NetworkPolicy/jobs")["spec"]["egress"][0]["to"].pop()
    assert any("NodeLocal DNSCache" in problem for problem in policy_problems(objects))


@pytest.mark.parametrize("overlay", ["prod-cpu", "kserve", "jobs"])
def test_prometheus_may_be_in_any_namespace(overlay: str) -> None:
    values = {"name": "settings", "behavior": "merge", "literals": ["prometheus-namespace=observability"]}
    components = ["components/settings"] if overlay != "jobs" else ["components/monitoring-jobs", "components/settings"]
    fields = {"namespace": "convoy", "resources": [f"overlays/{overlay}"], "components": components, "transformers": []}
    text = json.dumps(render_fields(fields | {"configMapGenerator": [values]}))
    assert '"kubernetes.io/metadata.name": "observability"' in text
    assert '"kubernetes.io/metadata.name": "monitoring"' not in text
