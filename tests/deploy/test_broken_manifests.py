"""Each check finds a manifest that is broken on purpose."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.deploy.command_lines import command_line_problems
from tests.deploy.manifests import CLUSTER, COMPOSITIONS, DEPLOY, Object, build, find, render
from tests.deploy.policy import policy_problems
from tests.deploy.references import reference_problems
from tests.deploy.schema import MODELS, SCHEMAS, schema_problems

KINDS = {
    "Namespace": ("dev", "Namespace/convoy-dev"),
    "Role": ("jobs", "Role/jobs"),
    "RoleBinding": ("jobs", "RoleBinding/jobs"),
    "ResourceQuota": ("foundation", "ResourceQuota/convoy"),
    "LimitRange": ("foundation", "LimitRange/convoy"),
    "PriorityClass": ("foundation", "PriorityClass/convoy-serving"),
    "ServiceAccount": ("dev", "ServiceAccount/serving"),
    "Service": ("dev", "Service/serving"),
    "PersistentVolumeClaim": ("dev", "PersistentVolumeClaim/models"),
    "Pod": ("shell", "Pod/shell"),
    "Deployment": ("dev", "Deployment/serving"),
    "PodDisruptionBudget": ("dev", "PodDisruptionBudget/serving"),
    "HorizontalPodAutoscaler": ("dev", "HorizontalPodAutoscaler/serving"),
    "NetworkPolicy": ("dev", "NetworkPolicy/serving"),
    "Job": ("pipeline", "Job/trainer"),
    "PodMonitor": ("prod-cpu", "PodMonitor/serving"),
    "PrometheusRule": ("prod-cpu", "PrometheusRule/convoy"),
    "ScaledObject": ("prod-gpu", "ScaledObject/serving"),
    "LocalQueue": ("train-gpu", "LocalQueue/training"),
    "GRPCRoute": ("serving with gateway", "GRPCRoute/serving"),
    "TrainJob": ("trainer-v2", "TrainJob/trainer"),
    "TrainingRuntime": ("trainer-v2", "TrainingRuntime/convoy"),
    "JobSet": ("jobset", "JobSet/trainer"),
    "ServingRuntime": ("kserve", "ServingRuntime/convoy"),
    "InferenceService": ("kserve", "InferenceService/convoy"),
}


def test_every_kind_is_broken_below() -> None:
    rendered = {item["kind"] for name in COMPOSITIONS for item in render(name)}
    assert rendered - {"ConfigMap"} == set(KINDS)  # a ConfigMap's data may have any key
    of_administrators = {item["kind"] for name in CLUSTER for item in build(DEPLOY / "cluster" / name)}
    assert {kind for _, kind in MODELS} | {path.stem for path in SCHEMAS.glob("*.json")} <= rendered | of_administrators


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_field_is_caught(kind: str) -> None:
    composition, name = KINDS[kind]
    item = find(render(composition), name)
    item.get("spec", item)["speck"] = "of dust"
    assert any("speck" in problem for problem in schema_problems([item]))


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_version_is_caught(kind: str) -> None:
    composition, name = KINDS[kind]
    item = find(render(composition), name)
    item["apiVersion"] = item["apiVersion"].rpartition("/")[0] + "/v7" if "/" in item["apiVersion"] else "v7"
    assert schema_problems([item])


@pytest.mark.parametrize("kind", ["Deployment", "Job", "JobSet", "TrainingRuntime", "ServingRuntime"])
def test_an_unknown_field_deep_in_a_pod_is_caught(kind: str) -> None:
    composition, name = KINDS[kind]
    item = find(render(composition), name)
    pod_of(item)["containers"][0]["securityContext"]["runAsNobody"] = True
    assert any("runAsNobody" in problem for problem in schema_problems([item]))


def pod_of(item: Object) -> Object:
    """Returns the pod's spec; each kind has it in another place."""
    spec = item["spec"]
    if item["kind"] == "TrainingRuntime":
        spec = spec["template"]["spec"]
    if "replicatedJobs" in spec:
        spec = spec["replicatedJobs"][0]["template"]["spec"]
    pod: Object = spec["template"]["spec"] if "template" in spec else spec
    return pod


def container_of(item: Object) -> Object:
    container: Object = pod_of(item)["containers"][0]
    return container


def set_option(item: Object, name: str, value: str) -> None:
    """Changes `--name=...` in the first container's arguments."""
    words = container_of(item)["args"]
    index = next(i for i, word in enumerate(words) if word.startswith(f"--{name}="))
    words[index] = f"--{name}={value}"


def set_variable(item: Object, name: str, value: str) -> None:
    next(entry for entry in container_of(item)["env"] if entry["name"] == name)["value"] = value


def add_variable(item: Object, config_map: str, key: str) -> None:
    """Adds a variable with a value from a ConfigMap."""
    source = {"configMapKeyRef": {"name": config_map, "key": key}}
    container_of(item)["env"].append({"name": "A", "valueFrom": source})


def secure(item: Object, **fields: Any) -> None:
    container_of(item)["securityContext"].update(fields)


def peer_of(item: Object) -> Object:
    """Returns the peer of another namespace that a NetworkPolicy lets in."""
    peer: Object = item["spec"]["ingress"][0]["from"][1]
    return peer


Break = Callable[[Object], object]

POLICY: dict[str, tuple[str, Break, str]] = {
    "root": ("Deployment", lambda d: pod_of(d)["securityContext"].update(runAsUser=0), "numeric user"),
    "no seccomp": ("Job", lambda d: pod_of(d)["securityContext"].pop("seccompProfile"), "seccompProfile"),
    "privileged": ("JobSet", lambda d: secure(d, privileged=True), "gain privileges"),
    "capability": (
        "Job",
        lambda d: secure(d, capabilities={"drop": ["ALL"], "add": ["SYS_ADMIN"]}),
        "capabilities",
    ),
    "writable root": (
        "ServingRuntime",
        lambda d: secure(d, readOnlyRootFilesystem=False),
        "read-only root",
    ),
    "host network": ("Deployment", lambda d: pod_of(d).update(hostNetwork=True), "host's namespaces"),
    "host path": (
        "Job",
        lambda d: pod_of(d)["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
        "restricted pods may not have",
    ),
    "endless scratch": ("Deployment", lambda d: pod_of(d)["volumes"][-1]["emptyDir"].clear(), "sizeLimit"),
    "half a CPU": ("Deployment", lambda d: container_of(d)["resources"]["limits"].update(cpu="500m"), "whole CPUs"),
    "burst": ("Job", lambda d: container_of(d)["resources"]["requests"].update(memory="1Gi"), "request its limits"),
    "latest": ("Deployment", lambda d: container_of(d).update(image="r.example.com/serving:latest"), "release"),
    "no registry": ("TrainingRuntime", lambda d: container_of(d).update(image="trainer:1.0.0"), "registry/name"),
    "token": ("Deployment", lambda d: pod_of(d).pop("automountServiceAccountToken"), "account's token"),
    "no readiness": ("Deployment", lambda d: container_of(d).pop("readinessProbe"), "readiness probe"),
    "liveness by readiness": (
        "Deployment",
        lambda d: container_of(d)["livenessProbe"]["grpc"].update(service="readiness"),
        "liveness probe",
    ),
    "short grace": ("Deployment", lambda d: pod_of(d).update(terminationGracePeriodSeconds=44), "is less than 45"),
    "long drain": ("Deployment", lambda d: set_option(d, "drain-delay-s", "21"), "is less than 61"),
    "no preStop": ("Deployment", lambda d: container_of(d).pop("lifecycle"), "preStop"),
    "short save": ("Job", lambda d: set_variable(d, "PET_SHUTDOWN_TIMEOUT", "56"), "is less than 61"),
    "writable models": (
        "Deployment",
        lambda d: [mount.pop("readOnly", None) for mount in container_of(d)["volumeMounts"]],
        "models read-only",
    ),
    "replicas": ("Deployment", lambda d: d["spec"].update(replicas=3), "would undo"),
    "hasty rollout": ("Deployment", lambda d: d["spec"].update(minReadySeconds=10), "before an old one stops"),
    "no scaler": ("ScaledObject", lambda d: d["spec"]["scaleTargetRef"].update(name="other"), "one autoscaler"),
    "stubborn budget": (
        "PodDisruptionBudget",
        lambda d: d["spec"].update(maxUnavailable=0),
        "must allow one pod",
    ),
    "open namespace": ("Namespace", lambda d: d["metadata"]["labels"].clear(), "restricted profile"),
    "homeless": ("Service", lambda d: d["metadata"].pop("namespace"), "must name a namespace"),
    "namespaced": (
        "PriorityClass",
        lambda d: d["metadata"].update(namespace="convoy"),
        "must not name a namespace",
    ),
    "no data is no load": (
        "ScaledObject",
        lambda d: d["spec"]["triggers"][0]["metadata"].pop("ignoreNullValues"),
        "ignoreNullValues",
    ),
    "no model is no sample": (
        "ScaledObject",
        lambda d: d["spec"]["triggers"][0]["metadata"].update(
            query='sum(convoy_open_requests{namespace="convoy",app_kubernetes_io_name="serving"})'
        ),
        "must count as 0",
    ),
    "four empty servers": ("ScaledObject", lambda d: d["spec"]["fallback"].update(replicas=4), "before there is any"),
    "second scaler": ("ScaledObject", lambda d: d["metadata"].pop("annotations"), "KEDA refuses it"),
    "unseen monitor": ("PodMonitor", lambda d: d["metadata"]["labels"].pop("release"), "kube-prometheus-stack"),
    "no runbook": (
        "PrometheusRule",
        lambda d: d["spec"]["groups"][0]["rules"][0]["annotations"].pop("runbook_url"),
        "ConvoyNoServer needs a runbook_url",
    ),
    "TLS probe": (
        "Deployment",
        lambda d: container_of(d).update(livenessProbe={"httpGet": {"path": "/v2/health/live", "port": "http"}}),
        "the metrics port",
    ),
    "any namespace": (
        "NetworkPolicy",
        lambda d: d["spec"]["ingress"][0]["from"][1].update(namespaceSelector={}),
        "must not let in other namespaces",
    ),
    "IPv4 only": (
        "NetworkPolicy",
        lambda d: d["spec"].update(egress=[{"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": []}}]}]),
        "must name both",
    ),
    "eager canary": (
        "GRPCRoute",
        lambda d: d["spec"]["rules"][0]["backendRefs"][1].update(weight=5),
        "begin at weight 0",
    ),
    "no room to scale": (
        "HorizontalPodAutoscaler",
        lambda d: d["spec"].update(minReplicas=2, maxReplicas=2),
        "nothing to decide",
    ),
    "another's requests": ("ScaledObject", lambda d: d["metadata"].update(namespace="cell-2"), "namespace convoy"),
    "the canary's requests": (
        "ScaledObject",
        lambda d: d["spec"]["triggers"][0]["metadata"].update(query='sum(convoy_open_requests{namespace="convoy"})'),
        "must count the requests of",
    ),
    "another's servers": ("PrometheusRule", lambda d: d["metadata"].update(namespace="cell-2"), "namespace convoy"),
}


@pytest.mark.parametrize("case", POLICY)
def test_what_is_against_the_rules_is_caught(case: str) -> None:
    kind, spoil, expected = POLICY[case]
    composition, name = KINDS[kind]
    objects = render(composition)
    spoil(find(objects, name))
    assert any(expected in problem for problem in policy_problems(objects))


def test_native_transport_without_a_closed_namespace_is_caught() -> None:
    objects = [item for item in render("dev") if item["metadata"]["name"] != "default-deny"]
    set_option(find(objects, "Deployment/serving"), "transport", "native")
    assert any("native transport needs" in problem for problem in policy_problems(objects))


@pytest.mark.parametrize("way", ["route", "load balancer"])
def test_native_transport_that_anyone_reaches_is_caught(way: str) -> None:
    """A gzip'd message of zeros is inflated before the native transport can refuse it."""
    objects = render("prod-cpu")
    assert policy_problems(objects) == []
    if way == "route":
        objects.append(find(render("prod-cpu with gateway"), "GRPCRoute/serving"))
    else:
        find(objects, "Service/serving")["spec"]["type"] = "LoadBalancer"
    assert any("must not be reached" in problem for problem in policy_problems(objects))


def test_data_that_is_deleted_with_a_release_is_caught() -> None:
    data = [item for item in render("foundation") if item["kind"] in ("Namespace", "PersistentVolumeClaim")]
    problems = policy_problems([*render("train-cpu"), *data])
    assert {problem.partition(":")[0] for problem in problems if "is deleted together with Job/trainer" in problem} == {
        *("Namespace/convoy", *(f"PersistentVolumeClaim/{name}" for name in ("models", "training", "jobs"))),
    }


REFERENCES: dict[str, tuple[str, Break, str]] = {
    "service selects nothing": ("Service", lambda d: d["spec"]["selector"].update(app="x"), "selects no pod"),
    "service port": ("Service", lambda d: d["spec"]["ports"][0].update(targetPort="grcp"), "port grcp"),
    "budget": ("PodDisruptionBudget", lambda d: d["spec"]["selector"].update(matchLabels={"a": "b"}), "selects no pod"),
    "monitor port": (
        "PodMonitor",
        lambda d: d["spec"]["podMetricsEndpoints"][0].update(port="metric"),
        "port metric ",
    ),
    "policy": ("NetworkPolicy", lambda d: d["spec"]["podSelector"].update(matchLabels={"a": "b"}), "selects no pod"),
    "policy port": (
        "NetworkPolicy",
        lambda d: d["spec"]["ingress"][0]["ports"][0].update(port=50051),
        "port 50051",
    ),
    "policy caller": (
        "NetworkPolicy",
        lambda d: peer_of(d)["podSelector"]["matchLabels"].update({"app.kubernetes.io/name": "serving"}),
        "lets no pod in or out",
    ),
    "policy way out": (
        "NetworkPolicy",
        lambda d: d["spec"]["egress"].append({"to": [{"podSelector": {"matchLabels": {"k8s-app": "dns"}}}]}),
        "lets no pod in or out",
    ),
    "policy namespace": (
        "NetworkPolicy",
        lambda d: peer_of(d)["namespaceSelector"].update(matchLabels={"kubernetes.io/metadata.name": "gateway"}),
        "Namespace/gateway",
    ),
    "scale target": ("HorizontalPodAutoscaler", lambda d: d["spec"]["scaleTargetRef"].update(name="x"), "Deployment/x"),
    "scale container": (
        "HorizontalPodAutoscaler",
        lambda d: d["spec"]["metrics"][0]["containerResource"].update(container="server"),
        "no container server",
    ),
    "own pods": ("Deployment", lambda d: d["spec"]["selector"].update(matchLabels={"a": "b"}), "its own pods"),
    "claim": (
        "Deployment",
        lambda d: pod_of(d)["volumes"][0]["persistentVolumeClaim"].update(claimName="model"),
        "PersistentVolumeClaim/model",
    ),
    "secret": (
        "Deployment",
        lambda d: pod_of(d)["volumes"].append({"name": "models", "secret": {"secretName": "s"}}),
        "Secret/s",
    ),
    "config map": ("Deployment", lambda d: add_variable(d, "settings", "a"), "there is no ConfigMap/settings"),
    "mount": ("Job", lambda d: container_of(d)["volumeMounts"][0].update(name="train"), "train, which is no volume"),
    "unused volume": ("Job", lambda d: container_of(d)["volumeMounts"].pop(), "mounted nowhere"),
    "probe port": (
        "Deployment",
        lambda d: container_of(d)["livenessProbe"]["grpc"].update(port=8003),
        "asks port 8003",
    ),
    "account": ("Job", lambda d: pod_of(d).update(serviceAccountName="root"), "ServiceAccount/root"),
    "subdomain": ("Job", lambda d: pod_of(d).update(subdomain="train"), "Service/train"),
    "backend": (
        "GRPCRoute",
        lambda d: d["spec"]["rules"][0]["backendRefs"][0].update(name="server"),
        "Service/server",
    ),
    "backend port": (
        "GRPCRoute",
        lambda d: d["spec"]["rules"][0]["backendRefs"][1].update(port=9),
        "has no port 9",
    ),
    "gateway": ("GRPCRoute", lambda d: d["spec"]["parentRefs"][0].update(name="x"), "Gateway/x"),
    "runtime": ("TrainJob", lambda d: d["spec"]["runtimeRef"].update(name="x"), "TrainingRuntime/x"),
    "model runtime": (
        "InferenceService",
        lambda d: d["spec"]["predictor"]["model"].update(runtime="x"),
        "ServingRuntime/x",
    ),
}


@pytest.mark.parametrize("case", REFERENCES)
def test_names_that_lead_nowhere_are_caught(case: str) -> None:
    kind, spoil, expected = REFERENCES[case]
    composition, name = KINDS[kind]
    objects = render(composition)
    spoil(find(objects, name))
    assert any(expected in problem for problem in reference_problems(objects))


def test_a_key_that_a_config_map_lacks_is_caught() -> None:
    for key, expected in (("convoy.json", []), ("convoy.yaml", ["has no key convoy.yaml"])):
        objects = render("prod-cpu")
        (dashboard,) = (item for item in objects if item["kind"] == "ConfigMap")
        add_variable(find(objects, "Deployment/serving"), dashboard["metadata"]["name"], key)
        problems = reference_problems(objects)
        assert [problem.partition(f"{dashboard['metadata']['name']} ")[2] for problem in problems] == expected


COMMAND_LINES: dict[str, tuple[str, Break, str]] = {
    "unknown option": ("Deployment", lambda d: container_of(d)["args"].append("--grcp-port=1"), "grcp-port"),
    "impossible value": ("Deployment", lambda d: set_option(d, "grace-s", "-1"), "must not be negative"),
    "loopback": ("Deployment", lambda d: set_option(d, "host", "127.0.0.1"), "cannot be reached"),
    "other port": ("Deployment", lambda d: set_option(d, "metrics-port", "9090"), "not opened"),
    "other folder": ("Deployment", lambda d: set_option(d, "model-repository", "/model"), "/model is in no volume"),
    "other threads": ("Deployment", lambda d: set_option(d, "num-threads", "8"), "not the CPU limit"),
    "native with TLS": (
        "Deployment",
        lambda d: container_of(d)["args"].extend(["--transport=native", "--tls-cert=/tmp/c", "--tls-key=/tmp/k"]),
        "native has no TLS",
    ),
    "no such recipe": ("Job", lambda d: set_option(d, "recipe", "imagenet"), "no recipe 'imagenet'"),
    "lost runs": ("JobSet", lambda d: set_option(d, "run-dir", "/runs/mnist"), "/runs/mnist is in no volume"),
    "unknown trainer option": ("TrainingRuntime", lambda d: container_of(d)["args"].append("--gpus=2"), "gpus"),
    "torchrun's variable": (
        "Job",
        lambda d: container_of(d)["env"].append({"name": "PET_NODES", "value": "2"}),
        "PET_NODES",
    ),
    "unread variable": (
        "ServingRuntime",
        lambda d: container_of(d)["env"].append({"name": "SERVING_PORT", "value": "1"}),
        "nothing reads the variable SERVING_PORT",
    ),
    "other program": ("Deployment", lambda d: container_of(d).update(command=["sh", "-c"]), "which nothing here knows"),
}


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_what_the_programs_would_refuse_is_caught(case: str) -> None:
    kind, spoil, expected = COMMAND_LINES[case]
    composition, name = KINDS[kind]
    objects = render(composition)
    spoil(find(objects, name))
    assert any(expected in problem for problem in command_line_problems(objects))
