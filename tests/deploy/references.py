"""Checks that everything that an object names exists: selected pods, ports, volumes, claims, services, accounts.

OUTSIDE lists what the cluster provides, with the reason.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from tests.deploy.manifests import Object, PodTemplate, matches, name_of, pod_templates, render
from tests.deploy.policy import all_containers

Objects = Sequence[Object]

OUTSIDE = {
    "Secret/serving-tls": "certificates are the operator's: components/tls",
    "Secret/pull": "the registry's login: components/pull-secret",
    "Secret/serving-tokens": "tokens are the operator's: components/auth",
    "Secret/jobs-tokens": "tokens are the operator's: overlays/jobs",
    "Gateway/public": "the cluster's Gateway: components/gateway",
    "ServiceAccount/default": "every namespace has one",
    "Namespace/gateway-system": "the Gateway's pods: components/gateway",
    "Namespace/monitoring": "Prometheus's pods: deploy/monitoring",
    "Namespace/kube-system": "the cluster's DNS",
}
NAMESPACE_NAME = "kubernetes.io/metadata.name"  # the API server puts it on every namespace
NAMESPACE_LABELS = {NAMESPACE_NAME, "convoy-clients"}
OUTSIDE_PODS = {
    "callers": {"convoy-client": "true"},
    "the cluster's DNS": {"k8s-app": "kube-dns"},
}
"""Labels of pods that are not ours and that policies name."""


def reference_problems(objects: Objects) -> list[str]:
    """Returns a line for each name that does not exist, neither in the objects nor in the foundation below them."""
    templates = list(pod_templates(objects))
    known = objects if any(item["kind"] == "Namespace" for item in objects) else [*objects, *render("foundation")]
    problems = [f"{name_of(item)}: {problem}" for item in objects for problem in _object(item, known, templates)]
    for template in templates:
        problems += [f"{template.owner}: {problem}" for problem in _pod(template, known)]
    return problems


def _object(item: Object, objects: Objects, templates: list[PodTemplate]) -> Iterator[str]:
    spec = item.get("spec", {})
    if item["kind"] == "Service":
        yield from _service(spec, templates)
    elif item["kind"] in ("PodDisruptionBudget", "PodMonitor"):
        behind = [template for template in templates if matches(spec["selector"], template.labels)]
        yield from () if behind else ["selects no pod"]
        for endpoint in spec.get("podMetricsEndpoints", ()):
            yield from _missing_port(endpoint["port"], behind)
    elif item["kind"] == "NetworkPolicy":
        yield from _network_policy(spec, objects, templates)
    elif item["kind"] in ("HorizontalPodAutoscaler", "ScaledObject"):
        yield from _scaler(spec, objects)
    elif item["kind"] == "Deployment":
        labels = spec["template"]["metadata"]["labels"]
        yield from () if matches(spec["selector"], labels) else ["does not select its own pods"]
    elif item["kind"] == "GRPCRoute":
        yield from _route(spec, objects)
    elif item["kind"] == "TrainJob":
        yield from _exists(f"TrainingRuntime/{spec['runtimeRef']['name']}", objects)
    elif item["kind"] == "InferenceService":
        yield from _exists(f"ServingRuntime/{spec['predictor']['model']['runtime']}", objects)


def _service(spec: Object, templates: list[PodTemplate]) -> Iterator[str]:
    behind = [template for template in templates if matches({"matchLabels": spec["selector"]}, template.labels)]
    if not behind:
        yield f"selects no pod: {spec['selector']}"
    for port in spec["ports"]:
        yield from _missing_port(port["targetPort"], behind)


def _network_policy(spec: Object, objects: Objects, templates: list[PodTemplate]) -> Iterator[str]:
    behind = [template for template in templates if matches(spec["podSelector"], template.labels)]
    if spec["podSelector"] and not behind:
        yield f"selects no pod: {spec['podSelector']}"
    for rule in spec.get("ingress", ()):
        for port in rule.get("ports", ()):
            yield from _missing_port(port["port"], behind)
        for peer in rule.get("from", ()):
            yield from _peer(peer, objects, templates)
    for rule in spec.get("egress", ()):
        for peer in rule.get("to", ()):
            yield from _peer(peer, objects, templates)


def _peer(peer: Object, objects: Objects, templates: list[PodTemplate]) -> Iterator[str]:
    namespaces = peer.get("namespaceSelector", {}).get("matchLabels", {})
    yield from (f"unknown label of a namespace: {label}" for label in set(namespaces) - NAMESPACE_LABELS)
    if NAMESPACE_NAME in namespaces:
        yield from _exists(f"Namespace/{namespaces[NAMESPACE_NAME]}", objects)
    known = [*OUTSIDE_PODS.values(), *(template.labels for template in templates)]
    if "podSelector" in peer and not any(matches(peer["podSelector"], labels) for labels in known):
        yield f"lets no pod in or out: {peer['podSelector']}"


def _scaler(spec: Object, objects: Objects) -> Iterator[str]:
    target = spec["scaleTargetRef"]
    yield from _exists(f"{target['kind']}/{target['name']}", objects)
    containers = {
        container["name"]
        for template in pod_templates(objects)
        if template.owner == f"{target['kind']}/{target['name']}"
        for container in template.spec["containers"]
    }
    for metric in spec.get("metrics", ()):
        if metric["containerResource"]["container"] not in containers:
            yield f"no container {metric['containerResource']['container']}"


def _route(spec: Object, objects: Objects) -> Iterator[str]:
    for parent in spec["parentRefs"]:
        yield from _exists(f"Gateway/{parent['name']}", objects)
    for rule in spec["rules"]:
        for backend in rule["backendRefs"]:
            yield from _exists(f"Service/{backend['name']}", objects)
            services = (item for item in objects if name_of(item) == f"Service/{backend['name']}")
            if not any(port["port"] == backend["port"] for item in services for port in item["spec"]["ports"]):
                yield f"Service/{backend['name']} has no port {backend['port']}"


def _pod(template: PodTemplate, objects: Objects) -> Iterator[str]:
    spec = template.spec
    yield from _exists(f"ServiceAccount/{spec.get('serviceAccountName', 'default')}", objects)
    if "priorityClassName" in spec:
        yield from _exists(f"PriorityClass/{spec['priorityClassName']}", objects)
    if "subdomain" in spec:
        yield from _exists(f"Service/{spec['subdomain']}", objects)
    volumes = {volume["name"] for volume in spec.get("volumes", ())}
    for volume in spec.get("volumes", ()):
        yield from _volume(volume, objects)
    mounted: set[str] = set()
    for container in all_containers(template):
        mounts = {mount["name"] for mount in container.get("volumeMounts", ())}
        mounted |= mounts
        yield from (f"{container['name']} mounts {name}, which is no volume" for name in sorted(mounts - volumes))
        yield from _container(container, objects)
    yield from (f"volume {name} is mounted nowhere" for name in sorted(volumes - mounted))


def _container(container: Object, objects: Objects) -> Iterator[str]:
    numbers = {port["containerPort"] for port in container.get("ports", ())}
    names = {port.get("name") for port in container.get("ports", ())}
    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
        probe = container.get(kind, {})
        port = (probe.get("grpc") or probe.get("httpGet") or {}).get("port")
        if port is not None and port not in numbers | names:
            yield f"{kind} asks port {port}, which {container['name']} has not"
    for entry in container.get("env", ()):
        source = entry.get("valueFrom", {})
        yield from _key(source.get("configMapKeyRef"), "ConfigMap", objects)
        yield from _key(source.get("secretKeyRef"), "Secret", objects)
        field = source.get("resourceFieldRef")
        if field and field.get("containerName", container["name"]) != container["name"]:
            yield f"{entry['name']} is of a container {field['containerName']}"


def _volume(volume: Object, objects: Objects) -> Iterator[str]:
    if "persistentVolumeClaim" in volume:
        yield from _exists(f"PersistentVolumeClaim/{volume['persistentVolumeClaim']['claimName']}", objects)
    if "secret" in volume:
        yield from _exists(f"Secret/{volume['secret']['secretName']}", objects)
    if "configMap" in volume:
        name = volume["configMap"]["name"]
        yield from _exists(f"ConfigMap/{name}", objects)
        for item in volume["configMap"].get("items", ()):
            yield from _key({"name": name, "key": item["key"]}, "ConfigMap", objects)


def _key(reference: dict[str, Any] | None, kind: str, objects: Objects) -> Iterator[str]:
    if reference is None:
        return
    yield from _exists(f"{kind}/{reference['name']}", objects)
    holders = [item for item in objects if name_of(item) == f"{kind}/{reference['name']}"]
    if holders and not any(reference["key"] in item.get("data", {}) for item in holders):
        yield f"{kind}/{reference['name']} has no key {reference['key']}"


def _exists(name: str, objects: Objects) -> Iterator[str]:
    if name not in OUTSIDE and not any(name_of(item) == name for item in objects):
        yield f"there is no {name}"


def _missing_port(port: int | str, templates: list[PodTemplate]) -> Iterator[str]:
    for template in templates:
        ports = [port for container in template.spec["containers"] for port in container.get("ports", ())]
        words = [word for container in template.spec["containers"] for word in container.get("args", ())]
        # KServe allows one port to be declared; a policy may name by its number another one that the process opens.
        if isinstance(port, int) and any(word.endswith(f"-port={port}") for word in words):
            continue
        if port not in {entry["containerPort"] for entry in ports} | {entry.get("name") for entry in ports}:
            yield f"port {port} is none of {template.owner}"
