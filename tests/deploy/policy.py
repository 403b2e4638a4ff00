"""Our own rules for manifests, beyond the schemas. Each rule yields a line for each violation."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields

from serving.config import ServeConfig
from tests.deploy.manifests import JOBS, Object, PodTemplate, name_of, pod_templates
from tests.deploy.training_policy import TRAINING_OBJECT_RULES, TRAINING_POD_RULES, trainers

Objects = Sequence[Object]

CLUSTER_SCOPED = {
    *("Namespace", "ClusterQueue", "ResourceFlavor", "Topology", "PriorityClass", "WorkloadPriorityClass"),
    "ClusterTrainingRuntime",
}
DEFAULTS = {field.name: field.default for field in fields(ServeConfig)}
FIRST_COPY_S = 1800
"""A server that copies its models opens its ports after the first copy."""
NODE_LOCAL_DNS = "169.254.20.10/32"
ONE_NODE = ["ReadWriteOnce"]
PRIVATE = {"10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16"}
PROTECTED = {
    "argocd.argoproj.io/sync-options": "Prune=false,Delete=false",
    "kustomize.toolkit.fluxcd.io/prune": "disabled",
}
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
    """Our pods have no access to the Kubernetes API, but for the training service's."""
    is_exempt = "ServingRuntime" in template.owner or template.owner == JOBS
    if template.spec.get("automountServiceAccountToken") is not False and not is_exempt:
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
                asked = probe.get("httpGet", {})
                right = asked.get("path") == path and asked.get("port") == "metrics" and "scheme" not in asked
            if not right:
                yield f"{container['name']} needs a {kind} probe that asks for {service} by gRPC, or the metrics port"
        start = container.get("startupProbe", {})
        patience_s = start.get("periodSeconds", 10) * start.get("failureThreshold", 3)
        if option_text(container, "model-cache") is not None and patience_s < FIRST_COPY_S:
            yield f"{container['name']} has {patience_s} s for its first copy of the models, and needs {FIRST_COPY_S}"


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
            is_copy = option_text(container, "model-cache") == mount["mountPath"]
            if mount["name"] == "models" and mount.get("readOnly") is not True and not is_copy:
                yield f"{container['name']} must mount the models read-only"


def namespaced(objects: Objects) -> Iterator[str]:
    """Namespaced objects name their namespace, and others do not; rights go to accounts of the same namespace."""
    for item in objects:
        if any(subject["namespace"] != item["metadata"]["namespace"] for subject in item.get("subjects", ())):
            yield f"{name_of(item)}: gives rights to an account of another namespace"
        if ("namespace" in item["metadata"]) is (item["kind"] in CLUSTER_SCOPED):
            yield f"{name_of(item)}: must {'not ' if item['kind'] in CLUSTER_SCOPED else ''}name a namespace"
        if item["kind"] == "Namespace":
            labels = item["metadata"].get("labels", {})
            if any(labels.get(f"pod-security.kubernetes.io/{mode}") != "restricted" for mode in ("enforce", "warn")):
                yield f"{name_of(item)}: must enforce the restricted profile"


def one_autoscaler(objects: Objects) -> Iterator[str]:
    """Each Deployment of servers has one autoscaler, and does not set the number of replicas."""
    for item in objects:
        if item["kind"] != "Deployment" or name_of(item) == JOBS:
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
        if item["kind"] == "Deployment" and name_of(item) != JOBS:
            container = item["spec"]["template"]["spec"]["containers"][0]
            pre_stop_s = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            known_s = item["spec"].get("minReadySeconds", 0) + pre_stop_s + seconds(container, "drain-delay-s")
            if known_s < 60:
                yield f"{name_of(item)}: a new pod is ready for {known_s:g} s before an old one stops, and needs 60"


def disruption_budget(objects: Objects) -> Iterator[str]:
    """A budget allows the eviction of one pod, so that nodes can be drained."""
    servers_are_there = any(item["kind"] == "Deployment" and name_of(item) != JOBS for item in objects)
    if servers_are_there and not _all_of(objects, "PodDisruptionBudget"):
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
    # Without a namespace of their own, the objects are in the foundation's, which denies by default.
    closed |= not _all_of(objects, "Namespace")
    opened = [name_of(item) for item in objects if _lets_anyone_in(item)]
    for template in pod_templates(objects):
        if any(option_text(container, "transport") == "native" for container in servers(template)):
            if not closed:
                yield f"{template.owner}: native transport needs a NetworkPolicy that denies by default"
            if opened:
                yield f"{template.owner}: native transport must not be reached through {opened}: any message fills it"


def _lets_anyone_in(item: Object) -> bool:
    is_route = item["kind"] in ("GRPCRoute", "HTTPRoute", "TLSRoute", "TCPRoute", "Ingress")
    return is_route or (item["kind"] == "Service" and item["spec"].get("type", "ClusterIP") != "ClusterIP")


def data_apart(objects: Objects) -> Iterator[str]:
    """Deleting an overlay deletes no volume, but for those of one node; a GitOps tool prunes none."""
    pods, namespaces = list(pod_templates(objects)), _all_of(objects, "Namespace")
    claims = _all_of(objects, "PersistentVolumeClaim")
    if namespaces and all(claim["spec"]["accessModes"] == ONE_NODE for claim in claims):
        return  # a laptop's overlay, which owns its namespace
    for item in (*claims, *(namespaces if claims else ())):
        if pods:
            yield f"{name_of(item)}: is deleted together with {pods[0].owner}; overlays/foundation has it"
        if not PROTECTED.items() <= item["metadata"].get("annotations", {}).items():
            yield f"{name_of(item)}: must have the annotations {PROTECTED}"


def callers(objects: Objects) -> Iterator[str]:
    """Policies let in no pod of a namespace without a label, and know all addresses of the outside."""
    for item in _all_of(objects, "NetworkPolicy"):
        for peer in (peer for rule in item["spec"].get("ingress", ()) for peer in rule.get("from", ())):
            if peer.get("namespaceSelector") == {}:
                yield f"{name_of(item)}: a label of the pod alone must not let in other namespaces"
        for rule in item["spec"].get("egress", ()):
            if "kube-dns" in str(rule) and NODE_LOCAL_DNS not in str(rule):
                yield f"{name_of(item)}: must let out to {NODE_LOCAL_DNS}, the DNS of nodes with NodeLocal DNSCache"
            blocks = {peer["ipBlock"]["cidr"]: peer["ipBlock"] for peer in rule.get("to", ()) if "ipBlock" in peer}
            if "0.0.0.0/0" in blocks and not set(blocks["0.0.0.0/0"].get("except", ())) >= PRIVATE:
                yield f"{name_of(item)}: 0.0.0.0/0 must except {sorted(PRIVATE)}"
            if ("0.0.0.0/0" in blocks) != ("::/0" in blocks):
                yield f"{name_of(item)}: must name both 0.0.0.0/0 and ::/0"


def monitored(objects: Objects) -> Iterator[str]:
    """kube-prometheus-stack selects by the label `release`, and each alert names the page that explains it."""
    for item in [*_all_of(objects, "PodMonitor"), *_all_of(objects, "PrometheusRule")]:
        if "release" not in item["metadata"].get("labels", {}):
            yield f"{name_of(item)}: kube-prometheus-stack ignores it without the label release"
    for item in _all_of(objects, "PrometheusRule"):
        for rule in (rule for group in item["spec"]["groups"] for rule in group["rules"] if "alert" in rule):
            url = rule["annotations"].get("runbook_url", "")
            if not re.fullmatch(rf"https://\S+#{rule['alert'].lower()}", url):
                yield f"{name_of(item)}: {rule['alert']} needs a runbook_url, not {url!r}"


def canary_waits(objects: Objects) -> Iterator[str]:
    """A new canary gets no requests, and costs one pod."""
    for item in _all_of(objects, "GRPCRoute"):
        weights = {ref["name"]: ref["weight"] for rule in item["spec"]["rules"] for ref in rule["backendRefs"]}
        if weights.get("serving-canary", 0) != 0:
            yield f"{name_of(item)}: a canary must begin at weight 0, not {weights['serving-canary']}"
    for item in objects:
        least = item["spec"].get("minReplicas", item["spec"].get("minReplicaCount")) if "spec" in item else None
        if _scales(item, "serving-canary") and least != 1:
            yield f"{name_of(item)}: a canary must begin with one replica, not {least}"


def own_pods_in_queries(objects: Objects) -> Iterator[str]:
    """Queries filter by their own namespace, and a scaler counts only the pods that it scales, not the canary's."""
    for item in _all_of(objects, "PrometheusRule"):
        rules = [rule for group in item["spec"]["groups"] for rule in group["rules"]]
        yield from _foreign(item, [rule["expr"] for rule in rules])
        for rule in rules:
            if 'namespace="' not in rule["expr"]:
                yield f"{name_of(item)}: {rule['alert']} asks about all namespaces"
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
            if " or sum(up{" not in trigger["metadata"]["query"]:
                yield f"{name_of(item)}: a server without a model has no open requests, and must count as 0"
        if item["spec"].get("fallback", {}).get("replicas", 0) > item["spec"]["minReplicaCount"]:
            yield f"{name_of(item)}: would scale to its fallback before there is any sample"
        scaler = item["spec"].get("advanced", {}).get("horizontalPodAutoscalerConfig", {}).get("name")
        moves = item["metadata"].get("annotations", {}).get("scaledobject.keda.sh/transfer-hpa-ownership")
        if (scaler, moves) != (_target(item), "true"):
            yield f"{name_of(item)}: KEDA refuses it where the HorizontalPodAutoscaler {_target(item)} exists"


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


def _all_of(objects: Objects, kind: str) -> list[Object]:
    return [item for item in objects if item["kind"] == kind]


POD_RULES: tuple[Callable[[PodTemplate], Iterator[str]], ...] = (
    *(restricted, bounded_memory_volumes, resources, images, no_api_access, probes, grace_period, models_read_only),
    *TRAINING_POD_RULES,
)
OBJECT_RULES: tuple[Callable[[Objects], Iterator[str]], ...] = (
    *(namespaced, one_autoscaler, slower_than_dns, disruption_budget, default_deny, own_pods_in_queries),
    *(keda_null_values, data_apart, callers, monitored, canary_waits),
    *TRAINING_OBJECT_RULES,
)
