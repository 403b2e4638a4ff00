"""Our own rules for manifests, beyond the schemas. Each rule yields a line for each violation."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields

from serving.config import ServeConfig
from tests.deploy.manifests import Object, PodTemplate, name_of, pod_templates

Objects = Sequence[Object]

CLUSTER_SCOPED = {"Namespace", "ClusterServingRuntime", "ClusterQueue", "ResourceFlavor"}
DEFAULTS = {field.name: field.default for field in fields(ServeConfig)}
RESTRICTED_VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim", "projected"),
    "secret",
}


def policy_problems(objects: Objects) -> list[str]:
    """Returns every violation of the rules in this module."""
    problems = [problem for rule in OBJECT_RULES for problem in rule(objects)]
    for template in pod_templates(objects):
        problems += [f"{template.owner}: {problem}" for rule in POD_RULES for problem in rule(template)]
    return problems


def restricted(template: PodTemplate) -> Iterator[str]:
    """The pod security profile `restricted`, and a read-only root file system.

    https://kubernetes.io/docs/concepts/security/pod-security-standards/
    """
    pod = template.spec.get("securityContext", {})
    for container in all_containers(template):
        name, mine = container["name"], container.get("securityContext", {})
        user = mine.get("runAsUser", pod.get("runAsUser", 0))
        if not mine.get("runAsNonRoot", pod.get("runAsNonRoot")) or user < 10000:
            yield f"{name} must run as a numeric user of 10000 or more"
        if mine.get("seccompProfile", pod.get("seccompProfile", {})).get("type") != "RuntimeDefault":
            yield f"{name} must have seccompProfile RuntimeDefault"
        if mine.get("allowPrivilegeEscalation") is not False or mine.get("privileged"):
            yield f"{name} must not be able to gain privileges"
        if mine.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{name} must drop all capabilities and add none"
        if mine.get("readOnlyRootFilesystem") is not True:
            yield f"{name} must have a read-only root file system"
    if any(template.spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
        yield "must not share the host's namespaces"
    for volume in template.spec.get("volumes", ()):
        if not RESTRICTED_VOLUMES & set(volume):
            yield f"volume {volume['name']} is of a kind that restricted pods may not have"


def bounded_memory_volumes(template: PodTemplate) -> Iterator[str]:
    """An emptyDir without a limit can fill the node."""
    for volume in template.spec.get("volumes", ()):
        if "emptyDir" in volume and "sizeLimit" not in (volume["emptyDir"] or {}):
            yield f"volume {volume['name']} needs a sizeLimit"


def resources(template: PodTemplate) -> Iterator[str]:
    """Requests equal limits, and CPUs are whole, because they determine the number of threads."""
    for container in all_containers(template):
        name, given = container["name"], container.get("resources", {})
        limits = given.get("limits", {})
        if not {"cpu", "memory"} <= set(limits) or given.get("requests") != limits:
            yield f"{name} must request its limits of cpu and memory"
        if not re.fullmatch(r"[1-9]\d*", str(limits.get("cpu", ""))):
            yield f"{name} must have whole CPUs, not {limits.get('cpu')}"


def images(template: PodTemplate) -> Iterator[str]:
    """An image has a release or a digest, never `latest`, and names its registry."""
    references = {container["name"]: container.get("image", "") for container in all_containers(template)}
    references |= {
        volume["name"]: volume["image"]["reference"] for volume in template.spec.get("volumes", ()) if "image" in volume
    }
    for name, image in references.items():
        if not re.fullmatch(r"[\w.-]+\.[\w.-]+(:\d+)?/[\w./-]+(:\d+\.\d+\.\d+|@sha256:[0-9a-f]{64})", image):
            yield f"{name}: image {image!r} must be registry/name:release or registry/name@sha256:digest"


def no_api_access(template: PodTemplate) -> Iterator[str]:
    """Our pods have no access to the Kubernetes API."""
    if template.spec.get("automountServiceAccountToken") is not False and "ServingRuntime" not in template.owner:
        yield "must not mount a service account's token"


def probes(template: PodTemplate) -> Iterator[str]:
    """A server has startup, liveness and readiness probes; gRPC probes have a numeric port."""
    for container in servers(template):
        for kind, service in (("startup", "liveness"), ("liveness", "liveness"), ("readiness", "readiness")):
            probe = container.get(f"{kind}Probe", {})
            path = f"/v2/health/{'ready' if service == 'readiness' else 'live'}"
            if "grpc" in probe:
                right = probe["grpc"].get("service") == service and "mode" not in probe["grpc"]
            else:
                right = probe.get("httpGet", {}).get("path") == path
            if not right:
                yield f"{container['name']} needs a {kind} probe that asks for {service}"


def grace_period(template: PodTemplate) -> Iterator[str]:
    """The grace period is at least the time that the process's own options allow, and 5 s more."""
    grace_s = template.spec.get("terminationGracePeriodSeconds", 30)
    for container in servers(template):
        pre_stop_s = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        needed_s = pre_stop_s + seconds(container, "drain-delay-s") + seconds(container, "grace-s") + 5
        if pre_stop_s == 0 and "ServingRuntime" not in template.owner:
            yield f"{container['name']} must sleep in preStop while endpoints change"
        if grace_s < needed_s:
            yield f"terminationGracePeriodSeconds {grace_s} is less than {needed_s:g}"
    for container in trainers(template):
        values = {entry["name"]: entry.get("value") for entry in container.get("env", ())}
        needed_s = float(values.get("PET_SHUTDOWN_TIMEOUT") or 30) + 5
        if grace_s < needed_s:
            yield f"terminationGracePeriodSeconds {grace_s} is less than {needed_s:g}"


def models_read_only(template: PodTemplate) -> Iterator[str]:
    """Servers read models; only training writes them."""
    for container in servers(template):
        for mount in container.get("volumeMounts", ()):
            if mount["name"] == "models" and mount.get("readOnly") is not True:
                yield f"{container['name']} must mount the models read-only"


def namespaced(objects: Objects) -> Iterator[str]:
    """Namespaced objects name their namespace, and others do not."""
    for item in objects:
        if ("namespace" in item["metadata"]) is (item["kind"] in CLUSTER_SCOPED):
            yield f"{name_of(item)}: must {'not ' if item['kind'] in CLUSTER_SCOPED else ''}name a namespace"
        if item["kind"] == "Namespace":
            labels = item["metadata"].get("labels", {})
            if any(labels.get(f"pod-security.kubernetes.io/{mode}") != "restricted" for mode in ("enforce", "warn")):
                yield f"{name_of(item)}: must enforce the restricted profile"


def one_autoscaler(objects: Objects) -> Iterator[str]:
    """Each Deployment has one autoscaler, and does not set the number of replicas."""
    for item in objects:
        if item["kind"] != "Deployment":
            continue
        name = item["metadata"]["name"]
        scalers = [name_of(scaler) for scaler in objects if _scales(scaler, name)]
        if len(scalers) != 1:
            yield f"{name_of(item)}: must have one autoscaler, not {scalers}"
        if "replicas" in item["spec"]:
            yield f"{name_of(item)}: replicas would undo what {scalers} decided"
    for item in _all_of(objects, "HorizontalPodAutoscaler"):
        if item["spec"]["minReplicas"] >= item["spec"]["maxReplicas"]:
            yield f"{name_of(item)}: has nothing to decide between minReplicas and maxReplicas"


def _scales(item: Object, deployment: str) -> bool:
    is_scaler = item["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")
    return is_scaler and _target(item) == deployment


def _target(scaler: Object) -> str:
    name: str = scaler["spec"]["scaleTargetRef"]["name"]
    return name


def slower_than_dns(objects: Objects) -> Iterator[str]:
    """A rollout leaves gRPC clients time to learn of a new pod before an old one stops.

    Clients resolve DNS every 30 s at most, and the answer may be 30 s old.
    """
    for item in objects:
        if item["kind"] == "Deployment":
            container = item["spec"]["template"]["spec"]["containers"][0]
            pre_stop_s = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            known_s = item["spec"].get("minReadySeconds", 0) + pre_stop_s + seconds(container, "drain-delay-s")
            if known_s < 60:
                yield f"{name_of(item)}: a new pod is ready for {known_s:g} s before an old one stops, and needs 60"


def disruption_budget(objects: Objects) -> Iterator[str]:
    """A budget allows the eviction of one pod, so that nodes can be drained."""
    if any(item["kind"] == "Deployment" for item in objects) and not _all_of(objects, "PodDisruptionBudget"):
        yield "a Deployment needs a PodDisruptionBudget"
    for item in _all_of(objects, "PodDisruptionBudget"):
        spec = item["spec"]
        if spec.get("maxUnavailable") != 1 or spec.get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
            yield f"{name_of(item)}: must allow one pod, and sick ones always, to be evicted"


def default_deny(objects: Objects) -> Iterator[str]:
    """Our namespaces deny traffic by default; the native transport requires that."""
    policies = _all_of(objects, "NetworkPolicy")
    closed = any(item["spec"]["podSelector"] == {} and "ingress" not in item["spec"] for item in policies)
    if _all_of(objects, "Namespace") and not closed:
        yield "a namespace needs a policy that denies by default"
    for template in pod_templates(objects):
        if any(option_text(container, "transport") == "native" for container in servers(template)) and not closed:
            yield f"{template.owner}: native transport needs a NetworkPolicy that denies by default"


def own_pods_in_queries(objects: Objects) -> Iterator[str]:
    """Queries filter by their own namespace, and a scaler counts only the pods that it scales, not the canary's."""
    for item in _all_of(objects, "PrometheusRule"):
        yield from _foreign(item, [rule["expr"] for group in item["spec"]["groups"] for rule in group["rules"]])
    for item in _all_of(objects, "ScaledObject"):
        queries = [trigger["metadata"]["query"] for trigger in item["spec"]["triggers"]]
        yield from _foreign(item, queries)
        own = f'{{namespace="{item["metadata"].get("namespace")}",app_kubernetes_io_name="{_target(item)}"}}'
        if not all(own in query for query in queries):
            yield f"{name_of(item)}: must count the requests of {own}"


def _foreign(item: Object, queries: Sequence[str]) -> Iterator[str]:
    for other in {name for query in queries for name in re.findall(r'namespace="([^"]*)"', query)}:
        if other != item["metadata"].get("namespace"):
            yield f"{name_of(item)}: asks about the namespace {other}"


def keda_null_values(objects: Objects) -> Iterator[str]:
    """Missing data must not count as no load, as it does by KEDA's default."""
    for item in _all_of(objects, "ScaledObject"):
        for trigger in item["spec"]["triggers"]:
            if trigger["metadata"].get("ignoreNullValues") != "false" or "fallback" not in item["spec"]:
                yield f"{name_of(item)}: needs ignoreNullValues false and a fallback"


def gang(objects: Objects) -> Iterator[str]:
    """A training Job starts all pods at once, as many as torchrun expects, and distinguishes exit codes."""
    for item in _all_of(objects, "Job"):
        spec = item["spec"]
        container = spec["template"]["spec"]["containers"][0]
        values = {entry["name"]: entry.get("value") for entry in container["env"]}
        if not spec["completions"] == spec["parallelism"] == int(values["PET_NNODES"] or 0):
            yield f"{name_of(item)}: completions, parallelism and PET_NNODES must be the same number"
        if spec["backoffLimit"] < 2 * spec["completions"]:
            yield f"{name_of(item)}: backoffLimit must outlast the failures of one lost host, which fails every pod"
        rules = spec["podFailurePolicy"]["rules"]
        fatal = {code for rule in rules if rule["action"] == "FailJob" for code in rule["onExitCodes"]["values"]}
        if fatal != {2, 5, 6}:
            yield f"{name_of(item)}: must fail at once on 2, 5 and 6, not on {sorted(fatal)}"
        if not any("DisruptionTarget" in str(rule) for rule in rules if rule["action"] == "Ignore"):
            yield f"{name_of(item)}: must not count disruptions"


def option_text(container: Object, name: str) -> str | None:
    """Returns the value of the last `--name=value`, if there is one."""
    words = (word.partition("=") for word in reversed(container.get("args", ())))
    return next((value for word, _, value in words if word == f"--{name}"), None)


def seconds(container: Object, name: str) -> float:
    """Returns the value of the server's option `--name`, or its default."""
    text = option_text(container, name)
    return DEFAULTS[name.replace("-", "_")] if text is None else float(text)


def all_containers(template: PodTemplate) -> list[Object]:
    """Returns the pod's containers and init containers."""
    return [*template.spec["containers"], *template.spec.get("initContainers", ())]


def servers(template: PodTemplate) -> list[Object]:
    return [container for container in all_containers(template) if "serving" in container.get("command", ())]


def trainers(template: PodTemplate) -> list[Object]:
    return [container for container in all_containers(template) if "trainer.launch" in container.get("command", ())]


def _all_of(objects: Objects, kind: str) -> list[Object]:
    return [item for item in objects if item["kind"] == kind]


POD_RULES: tuple[Callable[[PodTemplate], Iterator[str]], ...] = (
    *(restricted, bounded_memory_volumes, resources, images, no_api_access, probes, grace_period, models_read_only),
)
OBJECT_RULES: tuple[Callable[[Objects], Iterator[str]], ...] = (
    *(namespaced, one_autoscaler, slower_than_dns, disruption_budget, default_deny, own_pods_in_queries),
    *(keda_null_values, gang),
)
