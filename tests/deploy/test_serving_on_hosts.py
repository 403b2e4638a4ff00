"""The rendered Deployment's own command lines, as three pods: replaced under load, while a new version is published."""

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import wait_for
from tests.deploy.cluster import Pod, answers, terminate
from tests.deploy.manifests import find, render
from tests.deploy.training import Trained
from tests.hosts import Host, network

pytestmark = pytest.mark.slow

NUM_PODS = 3
DNS_S = 5
"""How seldom our client looks at DNS; others every 30 s, and minReadySeconds keeps a rollout slower. Here, once is
enough."""


class Rollout:
    """A Deployment's pods on hosts, three at a time, and the headless Service's name for those that are ready."""

    def __init__(self, overlay: str, hosts: Sequence[Host], client: Host, models: Path, folder: Path) -> None:
        objects = render(overlay)
        deployment = find(objects, "Deployment/serving")
        assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
        service = find(objects, "Service/serving-headless")
        self._name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
        self.target = f"dns:///{self._name}:{port}"
        if client.namespace is None:  # no DNS: all that there will be, of which only some answer at a time
            self.target = "ipv4:" + ",".join(f"{host.address}:{port}" for host in hosts)
        self._client = client
        spec = deployment["spec"]["template"]["spec"]
        places = {"/models": models}
        self.pods = [Pod(host, spec, places, folder / f"{host.name}.log") for host in hosts]
        self._ready: list[Pod] = []
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def bring(self, pods: Sequence[Pod]) -> None:
        """Start pods, and put each into DNS when its readiness probe says so."""
        for pod in pods:
            self._processes[pod.host.name] = pod.start()
        for pod in pods:
            self._await(pod)
            self._publish([*self._ready, pod])

    def _await(self, pod: Pod) -> None:
        """The kubelet's probes, in their order."""
        process = self._processes[pod.host.name]
        for probe in ("startup", "liveness", "readiness"):
            what = f"{pod.host.name}'s {probe} probe"
            wait_for(what, partial(answers, pod, probe), lambda: process.poll() is not None)

    def replace(self, old: Pod, new: Pod) -> subprocess.Popen[bytes]:
        """maxSurge 1, maxUnavailable 0: the new pod is ready before the old one has to go."""
        self.bring([new])
        return self.retire(old)

    def retire(self, pod: Pod) -> subprocess.Popen[bytes]:
        """Take a pod out of DNS and end it; its end is not awaited."""
        self._publish([other for other in self._ready if other is not pod])
        terminate(pod, self._processes[pod.host.name])
        return self._processes[pod.host.name]

    def _publish(self, pods: list[Pod]) -> None:
        self._ready = pods
        self._client.tell({self._name: [pod.host.address for pod in pods]})


@pytest.fixture
def models(trained: Trained, tmp_path: Path) -> Path:
    """A model volume with what the training Job published, and a place beside it to publish from."""
    return Path(shutil.copytree(trained.models, tmp_path / "models"))


def publish(models: Path) -> None:
    """A second version, as the trainer publishes one: complete, by one rename."""
    shutil.copytree(models / "mnist/1", models / "mnist/.incoming")
    (models / "mnist/.incoming").rename(models / "mnist/2")


def requests_of(pod: Pod) -> float:
    """How many requests a pod has answered, by its metrics."""
    with urllib.request.urlopen(f"http://{pod.host.address}:8002/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    counts = (line for line in lines if line.startswith("convoy_requests_total{") and 'outcome="success"' in line)
    return sum(float(line.split()[-1]) for line in counts)


@pytest.mark.parametrize("overlay", ["prod-cpu", "dev"])  # native and grpcio
def test_no_request_fails_while_all_pods_are_replaced_and_a_version_is_published(
    overlay: str, has_namespaces: bool, models: Path, tmp_path: Path
) -> None:
    names = [f"serving-{number}" for number in range(2 * NUM_PODS)]
    with network([*names, "client"], namespaces=has_namespaces) as (*hosts, client):
        rollout = Rollout(overlay, hosts, client, models, tmp_path)
        first, second = rollout.pods[:NUM_PODS], rollout.pods[NUM_PODS:]
        rollout.bring(first)
        load = client.start(
            [sys.executable, str(Path(__file__).parent / "load.py"), rollout.target], {}, tmp_path / "load.log"
        )
        for pod in first:
            wait_for(f"a request to {pod.host.name}", lambda pod=pod: requests_of(pod) > 10)
        began = time.monotonic()
        rollout.bring(second[:1])
        publish(models)
        for pod in [*first[1:], second[0]]:
            wait_for(f"version 2 on {pod.host.name}", lambda pod=pod: pod.said("mnist version 2 is ready"))
        wait_for("the client to be free to look at DNS", lambda: time.monotonic() > began + DNS_S)
        ended = [rollout.retire(first[0])]
        ended += [rollout.replace(old, new) for old, new in zip(first[1:], second[1:], strict=True)]
        codes = [process.wait(120) for process in ended]
        for pod in second:
            wait_for(f"a request to {pod.host.name}", lambda pod=pod: requests_of(pod) > 10)
        load.stdin.close()
        assert load.wait(60) == 0
    told = json.loads((tmp_path / "load.log").read_text().splitlines()[-1])
    assert told["failed"] == []
    assert codes == [0, 0, 0], [pod.text for pod in first]
    assert set(told["answered"]) == {"1", "2"}
    assert min(told["answered"].values()) > 10
