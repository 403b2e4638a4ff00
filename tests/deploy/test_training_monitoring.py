"""Training alerts fire exactly when they should; rules and dashboard use metrics that the trainer has."""

import json
import re
import subprocess
from copy import deepcopy
from pathlib import Path

import pytest
import yaml

from tests.deploy.manifests import COMPOSITIONS, DEPLOY, ROOT, Object, fields_of, find, render, render_fields
from tests.deploy.policy import policy_problems
from trainer.sinks.prometheus import NAMES

FOLDER = DEPLOY / "components/monitoring-training"
RULES: Object = yaml.safe_load((FOLDER / "prometheusrule.yaml").read_text())["spec"]
DASHBOARD: Object = json.loads((FOLDER / "grafana-dashboard.json").read_text())
TESTS = Path(__file__).parent / "training_alerts.yaml"
KUBE_STATE = {"failed", "status_failed", "status_active", "status_start_time", "created"}


def rules() -> list[Object]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def queries() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


def test_every_metric_exists() -> None:
    texts = [*(rule["expr"] for rule in rules()), *queries(), json.dumps(DASHBOARD["templating"])]
    used = {name for text in texts for name in re.findall(r"(?:convoy|kube)_\w+", text)}
    assert used == NAMES - {"convoy_training_seconds"} | {f"kube_job_{name}" for name in KUBE_STATE}


def test_the_dashboards_variables_are_known() -> None:
    known = {variable["name"] for variable in DASHBOARD["templating"]["list"]} | {"__all"}
    assert set(re.findall(r"\$\{?(\w+)\}?", json.dumps(DASHBOARD))) <= known


def test_every_alert_is_explained_and_tested() -> None:
    checks = [check for test in yaml.safe_load(TESTS.read_text())["tests"] for check in test["alert_rule_test"]]
    runbook = (ROOT / "docs/runbook.md").read_text()
    for name in {rule["alert"] for rule in rules()}:
        assert f"\n### {name}\n" in runbook
        fires = {bool(check.get("exp_alerts")) for check in checks if check["alertname"] == name}
        assert fires == {True, False}, f"{name} never fires, or is never silent"


def test_queries_are_of_one_namespace() -> None:
    own = 'namespace="convoy"'
    assert all(own in rule["expr"] for rule in rules())
    fields = fields_of(COMPOSITIONS["train-gpu"]) | {"namespace": "cell-2"}
    objects = render_fields(fields)
    assert policy_problems(objects) == []
    groups = find(objects, "PrometheusRule/convoy-training")["spec"]["groups"]
    assert all('namespace="cell-2"' in rule["expr"] for group in groups for rule in group["rules"])
    problems = policy_problems(render_fields(fields | {"transformers": []}))
    assert any("asks about the namespace convoy" in problem for problem in problems)


@pytest.mark.parametrize("name", ["train-gpu", "jobset-gpu", "trainer-v2-gpu"])
def test_prometheus_asks_the_port_that_the_trainer_opens(name: str) -> None:
    objects = render(name)
    (endpoint,) = find(objects, "PodMonitor/trainer")["spec"]["podMetricsEndpoints"]
    (port,) = find(objects, "NetworkPolicy/trainer-metrics")["spec"]["ingress"][0]["ports"]
    assert endpoint["port"] == port["port"] == "metrics"
    text = json.dumps(objects)
    assert "--metrics-address=0.0.0.0:8007" in text
    assert '{"containerPort": 8007, "name": "metrics"}' in text


def test_alerts_fire_when_they_should(promtool: Path, tmp_path: Path) -> None:
    assert promtool_problems(promtool, tmp_path, RULES, TESTS.read_text()) == ""


@pytest.mark.parametrize(
    ("old", "new", "alert"),
    [
        ('namespace="convoy",job_name', "job_name", "ConvoyTrainingFailed"),
        ('"for": "5m"', '"for": "0s"', "ConvoyTrainingFailed"),
        ("changes(kube_job_created", "changes(kube_job_failed", "ConvoyTrainingRestarts"),
    ],
)
def test_an_alert_of_release_0_1_is_caught(old: str, new: str, alert: str, promtool: Path, tmp_path: Path) -> None:
    text = json.dumps(RULES).replace('\\"', "'")
    spoilt = text.replace(old.replace('="', "='").replace('",j', "',j"), new)
    assert spoilt != text
    assert alert in promtool_problems(promtool, tmp_path, json.loads(spoilt), TESTS.read_text())


def test_the_dashboard_opens_outside_a_cluster(promtool: Path, tmp_path: Path) -> None:
    """Each query finds a run whose series have no labels of Kubernetes, while every variable is at its default."""
    series = [{"series": f'{name}{{run="mnist",instance="localhost:8007"}}', "values": "1+1x60"} for name in NAMES]
    texts = [re.sub(r"\$(namespace|run)", ".*", query) for query in queries()]
    expected = [{"labels": "{}", "value": 1}]
    checks = [{"expr": f"count({text}) > bool 0", "eval_time": "10m", "exp_samples": expected} for text in texts]
    test = {"interval": "15s", "input_series": series, "promql_expr_test": checks}
    document = yaml.safe_dump({"evaluation_interval": "15s", "rule_files": ["rules.yaml"], "tests": [test]})
    assert promtool_problems(promtool, tmp_path, {"groups": []}, document) == ""


def promtool_problems(promtool: Path, folder: Path, rules: Object, tests: str) -> str:
    """Checks rules and runs their unit tests, which say nothing of runbook_url. Returns what fails."""
    bare = deepcopy(rules)
    for rule in (rule for group in bare["groups"] for rule in group["rules"]):
        rule["annotations"].pop("runbook_url")
    (folder / "rules.yaml").write_text(yaml.safe_dump(bare))
    (folder / "tests.yaml").write_text(tests)
    for command in (["check", "rules", "--lint-fatal", "rules.yaml"], ["test", "rules", "tests.yaml"]):
        done = subprocess.run(
            [promtool, *command], cwd=folder, capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode:
            return done.stdout + done.stderr
    return ""
