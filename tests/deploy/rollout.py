"""Replaces the pods of the rendered Deployment as Kubernetes does."""

import subprocess
import urllib.request
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.conftest import wait_for
from tests.deploy.cluster import Pod, answers, terminate
from tests.deploy.manifests import find, render
from tests.hosts import Host


class Rollout:
    """A Deployment's pods on hosts, three at a time, and the headless Service's name for the ready ones."""

    def __init__(
        self, overlay: str, hosts: Sequence[Host], client: Host, models: Path, folder: Path, *, workers: int = 1
    ) -> None:
        objects = render(overlay)
        deployment = find(objects, "Deployment/serving")
        assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
        service = find(objects, "Service/serving-headless")
        self._name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
        self.target = f"dns:///{self._name}:{port}"
        if client.namespace is None:  # no DNS: all pods that there will be, of which only some answer at a time
            self.target = "ipv4:" + ",".join(f"{host.address}:{port}" for host in hosts)
        self._client = client
        spec = deployment["spec"]["template"]["spec"]
        places = {"/models": models}
        extra = (f"--workers={workers}",) if workers > 1 else ()
        self.pods = [Pod(host, spec, places, folder / f"{host.name}.log", extra=extra) for host in hosts]
        self._ready: list[Pod] = []
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start_pods(self, pods: Sequence[Pod]) -> None:
        """Starts pods, and adds each to DNS when its readiness probe succeeds."""
        for pod in pods:
            self._processes[pod.host.name] = pod.start()
        for pod in pods:
            self._wait_until_ready(pod)
            self._publish([*self._ready, pod])

    def _wait_until_ready(self, pod: Pod) -> None:
        """Waits for the probes in the order in which the kubelet runs them."""
        process = self._processes[pod.host.name]
        for probe in ("startup", "liveness", "readiness"):
            what = f"{pod.host.name}'s {probe} probe"
            wait_for(what, partial(answers, pod, probe), lambda: process.poll() is not None)

    def replace(self, old: Pod, new: Pod) -> subprocess.Popen[bytes]:
        """Starts the new pod, then ends the old one: maxSurge 1, maxUnavailable 0."""
        self.start_pods([new])
        return self.remove(old)

    def remove(self, pod: Pod) -> subprocess.Popen[bytes]:
        """Removes a pod from DNS and ends it, without waiting for the end."""
        self._publish([other for other in self._ready if other is not pod])
        terminate(pod, self._processes[pod.host.name])
        return self._processes[pod.host.name]

    def _publish(self, pods: list[Pod]) -> None:
        self._ready = pods
        self._client.set_names({self._name: [pod.host.address for pod in pods]})


def requests_of(pod: Pod) -> float:
    """Returns the number of requests that a pod has answered, from its metrics."""
    with urllib.request.urlopen(f"http://{pod.host.address}:8002/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    counts = (line for line in lines if line.startswith("convoy_requests_total{") and 'outcome="success"' in line)
    return sum(float(line.split()[-1]) for line in counts)
