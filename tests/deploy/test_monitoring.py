"""Alerts fire exactly when they should; rules, dashboard and scaler use metrics that the server has."""

import json
import re
import shutil
import subprocess
from copy import deepcopy
from pathlib import Path

import pytest
import yaml

from serving.observability.metrics import NAMES
from tests.deploy.manifests import DEPLOY, ROOT, Object, find, render, render_fields
from tests.deploy.policy import policy_problems

RULES = yaml.safe_load((DEPLOY / "monitoring/prometheusrule.yaml").read_text())["spec"]
RUNBOOK = (ROOT / "docs/runbook.md").read_text()
DASHBOARD = json.loads((DEPLOY / "monitoring/grafana-dashboard.json").read_text())
TESTS = Path(__file__).parent / "alerts.yaml"

ELSEWHERE = {
    "up": "Prometheus itself",
    "process_resident_memory_bytes": "prometheus_client",
    "process_cpu_seconds_total": "prometheus_client",
    "kube_job_failed": "kube-state-metrics",
    "kube_job_status_failed": "kube-state-metrics",
    "kube_job_status_active": "kube-state-metrics",
    "kube_job_status_start_time": "kube-state-metrics",
}
_NO_METRICS = {"and", "or", "on", "by", "le", "time", "rate", "sum", "max", "min", "absent", "histogram_quantile"}


def metrics_in(expression: str) -> set[str]:
    """Returns the metrics in an expression, without a histogram's suffixes."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"|\b(?:by|on)\s*\([^)]*\)", " ", expression)
    words = set(re.findall(r"[a-z_]\w*", bare)) - _NO_METRICS
    return {re.sub(r"_(bucket|sum|count)$", "", word) if word not in NAMES else word for word in words}


def unknown_metrics(expression: str) -> set[str]:
    return metrics_in(expression) - NAMES - set(ELSEWHERE)


def rules() -> list[Object]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def expressions() -> dict[str, str]:
    """Returns every PromQL expression that we ship, by its place."""
    scaler = find(render("prod-gpu"), "ScaledObject/serving")["spec"]["triggers"][0]["metadata"]["query"]
    found = {rule["alert"]: rule["expr"] for rule in rules()} | {"ScaledObject": scaler}
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            found[f"{panel['title']}, {target['refId']}"] = target["expr"]
    return found


@pytest.mark.parametrize("where", expressions())
def test_every_metric_exists(where: str) -> None:
    assert unknown_metrics(expressions()[where]) == set()


def test_unknown_metrics_are_caught() -> None:
    assert unknown_metrics('sum by (model) (rate(convoy_request_total{outcome="x"}[5m])) > 0') == {
        "convoy_request_total"
    }


def test_outcomes_are_the_servers() -> None:
    outcomes = {"success", "rejected", "canceled", "backend", "other"}
    named = {word for text in expressions().values() for word in re.findall(r'outcome=~?"([^"]+)"', text)}
    assert {part for word in named for part in word.split("|")} <= outcomes


def test_the_dashboards_variables_are_known() -> None:
    known = {variable["name"] for variable in DASHBOARD["templating"]["list"]} | {"__rate_interval", "__all"}
    used = set(re.findall(r"\$\{?(\w+)\}?", json.dumps(DASHBOARD)))
    assert used <= known
    for variable in DASHBOARD["templating"]["list"]:
        for metric in re.findall(r"label_values\((\w+)", variable["query"]):
            assert metric in NAMES


def test_a_cells_queries_use_its_own_namespace() -> None:
    objects = render_fields(
        {
            "namespace": "cell-2",
            "resources": ["overlays/prod-gpu"],
            "components": [],
            "transformers": ["monitoring/namespace"],
        }
    )
    assert policy_problems(objects) == []
    query = find(objects, "ScaledObject/serving")["spec"]["triggers"][0]["metadata"]["query"]
    own = '{namespace="cell-2",app_kubernetes_io_name="serving"}'
    assert query == f"sum(convoy_open_requests{own}) or sum(up{own} == 1) * 0"
    alerts = find(objects, "PrometheusRule/convoy")["spec"]["groups"][0]["rules"]
    assert 'namespace="cell-2"' in next(rule["expr"] for rule in alerts if rule["alert"] == "ConvoyNoServer")


def test_a_label_distinguishes_servers_and_canaries() -> None:
    """Alerts and queries use a label that the PodMonitor copies from the pods."""
    monitor = find(render("prod-cpu"), "PodMonitor/serving")
    assert [re.sub(r"\W", "_", label) for label in monitor["spec"]["podTargetLabels"]] == ["app_kubernetes_io_name"]


def test_every_alert_is_explained_and_tested() -> None:
    tests = yaml.safe_load(TESTS.read_text())["tests"]
    checks = [check for test in tests for check in test["alert_rule_test"]]
    for rule in rules():
        name = rule["alert"]
        assert re.search(rf"^##+ {name}$", RUNBOOK, re.MULTILINE), f"docs/runbook.md has no heading {name}"
        assert any(check["alertname"] == name and check.get("exp_alerts") for check in checks), f"{name} never fires"
        is_instant = "for" not in rule
        silent = any(check["alertname"] == name and not check.get("exp_alerts") for check in checks)
        assert silent or is_instant or name == "ConvoyServerDown", f"{name} is never silent"


def test_alerts_fire_when_they_should(promtool: Path, tmp_path: Path) -> None:
    run_promtool(promtool, tmp_path, deepcopy(RULES))


def test_an_alert_that_does_not_fire_is_caught(promtool: Path, tmp_path: Path) -> None:
    text = json.dumps(RULES).replace("> 0.01", "> 0.03")
    with pytest.raises(AssertionError, match="ConvoyErrors"):
        run_promtool(promtool, tmp_path, json.loads(text))


OUTSIDE = {"job": "convoy", "instance": "localhost:8002"}
"""Labels of a server that Prometheus scrapes outside of a cluster, by a static configuration."""
OF_MODELS = {"model": "mnist", "version": "1"}
OTHERS = {
    "outcome": "success",
    "closed": "idle",
    "method": "ModelInfer",
    "status": "OK",
    "reason": "not_found",
}


HISTOGRAMS = ("convoy_batch_size_rows", "convoy_request_duration_seconds", "convoy_call_duration_seconds")


def series(metric: str) -> list[Object]:
    """Returns samples of a metric as that server has them, growing by one each 15 s."""
    labels = OUTSIDE | ({} if metric.startswith("process_") else OF_MODELS | OTHERS)
    suffixes: list[tuple[str, Object]] = [("", {})]
    if metric in HISTOGRAMS:
        suffixes = [("_bucket", {"le": "0.1"}), ("_bucket", {"le": "+Inf"}), ("_sum", {}), ("_count", {})]
    found = []
    for suffix, more in suffixes:
        pairs = ",".join(f'{name}="{value}"' for name, value in (labels | more).items())
        found.append({"series": f"{metric}{suffix}{{{pairs}}}", "values": "1+1x60"})
    return found


def test_the_dashboard_opens_outside_a_cluster(promtool: Path, tmp_path: Path) -> None:
    """Each query finds a server whose series have no labels of Kubernetes, while every variable is at its default."""
    queries = {}
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            queries[f"{panel['title']} {target['refId']}"] = target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            assert (variable["current"]["value"], variable["allValue"]) == ("$__all", ".*"), variable["name"]
        for name, query in queries.items():
            queries[name] = query.replace(f"${variable['name']}", ".*")
    metrics = {metric for query in queries.values() for metric in metrics_in(query)}
    test = {
        "interval": "15s",
        "input_series": [one for metric in sorted(metrics) for one in series(metric)],
        "promql_expr_test": [
            {
                "expr": f"count({query.replace('$__rate_interval', '1m')}) > bool 0",
                "eval_time": "10m",
                "exp_samples": [{"labels": "{}", "value": 1}],
            }
            for query in queries.values()
        ],
    }
    (tmp_path / "dashboard.yaml").write_text(yaml.safe_dump({"evaluation_interval": "15s", "tests": [test]}))
    command = [promtool, "test", "rules", "dashboard.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


LABELS = 'namespace="convoy",app_kubernetes_io_name="serving"'
SCALES: dict[str, tuple[list[str], list[float]]] = {
    "no pod runs yet: KEDA falls back to the least number": ([], []),
    "pods without a model count as no load": (["up{LABELS,pod='a'} 1"], [0]),
    "a pod that does not answer is no sample": (["up{LABELS,pod='a'} 0"], []),
    "open requests are added up": (
        ["up{LABELS,pod='a'} 1", "convoy_open_requests{LABELS,pod='a'} 5", "convoy_open_requests{LABELS,pod='b'} 7"],
        [12],
    ),
}


@pytest.mark.parametrize("case", SCALES)
def test_what_the_scaler_sees(case: str, promtool: Path, tmp_path: Path) -> None:
    given, expected = SCALES[case]
    query = find(render("prod-gpu"), "ScaledObject/serving")["spec"]["triggers"][0]["metadata"]["query"]
    series = [text.replace("LABELS", LABELS).replace("'", '"').rpartition(" ") for text in given]
    test = {
        "interval": "15s",
        "input_series": [{"series": name, "values": f"{value}x9"} for name, _, value in series],
        "promql_expr_test": [
            {
                "expr": query,
                "eval_time": "1m",
                "exp_samples": [{"labels": "{}", "value": value} for value in expected],
            }
        ],
    }
    (tmp_path / "scaler.yaml").write_text(yaml.safe_dump({"evaluation_interval": "15s", "tests": [test]}))
    command = [promtool, "test", "rules", "scaler.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def run_promtool(promtool: Path, folder: Path, rules: Object) -> None:
    """Checks the rules and runs their unit tests, which say nothing of runbook_url."""
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        rule["annotations"].pop("runbook_url", None)
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
    shutil.copy(TESTS, folder)
    for command in (["check", "rules", "--lint-fatal", "rules.yaml"], ["test", "rules", TESTS.name]):
        done = subprocess.run(
            [promtool, *command], cwd=folder, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
