"""Runs the manifests' command lines on several hosts.

In the training Job ranks find each other by name, and hosts are lost and replaced. The Deployment serves the model that
the Job published: three pods are replaced under load while a new version is published. All in one file, so that one
process of the suite trains once.
"""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import wait_for
from tests.deploy.cluster import Pod
from tests.deploy.rollout import Rollout, requests_of
from tests.deploy.training import Trained, build_job, service_names
from tests.hosts import network

pytestmark = pytest.mark.slow

NUM_PODS = 3
DNS_S = 5
"""The interval at which our client resolves DNS. Other clients do so every 30 s, and minReadySeconds makes a rollout
slower than that."""


def test_two_hosts_finish_although_one_is_evicted_and_one_is_killed(trained: Trained) -> None:
    assert trained.outcome == "Complete", trained.logs
    assert trained.result["world_size"] == 2
    assert trained.result["num_test"] == 1000
    assert float(str(trained.result["test_accuracy"])) > 0.8


def test_peers_of_an_evicted_host_save_and_exit_and_no_failure_is_counted(trained: Trained) -> None:
    assert trained.codes[:2] == [143, 143], trained.logs
    assert trained.ignored == 2


def test_a_killed_host_counts_failures_and_the_run_resumes(trained: Trained) -> None:
    assert trained.codes[2] == 137, trained.logs
    assert trained.codes[-2:] == [0, 0]
    assert 2 <= trained.failures <= 6, trained.codes
    assert trained.logs.count(", saved in") == 2  # after the eviction, and after the kill


def test_the_job_publishes_into_the_model_volume(trained: Trained) -> None:
    assert trained.result["exported"] == str(trained.models / "mnist" / "1")
    assert (trained.models / "mnist/1/model.onnx").is_file()


def test_four_hosts_train_although_dns_is_late(has_namespaces: bool, tmp_path: Path) -> None:
    names = [f"trainer-{index}" for index in range(4)]
    with network(names, namespaces=has_namespaces) as hosts:
        job = build_job("train-cpu", hosts, tmp_path, "--epochs=1", "--no-export")
        # torch then logs each failed lookup of a name; all pods share the container.
        job.pods[0].container["env"].append({"name": "TORCH_CPP_LOG_LEVEL", "value": "WARNING"})
        addresses = service_names(hosts)
        # No host, rank 0's included, can resolve rank 0's name. (Without namespaces no DNS can be late.)
        late = {name: at for name, at in addresses.items() if "trainer-0" not in name}
        for host in hosts:
            host.set_names(late if has_namespaces else addresses)
        job.start()
        if has_namespaces:
            for pod in job.pods[1:]:
                wait_for("a host that cannot resolve the name", lambda pod=pod: pod.has_logged("trainer-0.trainer"))
            assert all(process.poll() is None for process in job.processes.values())
            for host in hosts:
                host.set_names(addresses)
        trained = Trained.by(job, tmp_path)
    assert trained.outcome == "Complete", trained.logs
    assert trained.codes == [0] * 4, trained.logs
    assert trained.result["world_size"] == 4


def test_a_wrong_configuration_ends_the_job_at_once(has_namespaces: bool, tmp_path: Path) -> None:
    with network(["trainer-0", "trainer-1"], namespaces=has_namespaces) as hosts:
        job = build_job("pipeline", hosts, tmp_path, "--image-size=0")
        for host in hosts:
            host.set_names(service_names(hosts))
        job.start()
        trained = Trained.by(job, tmp_path)
    assert trained.outcome == "Failed", trained.logs
    assert trained.codes[-1] == 2
    assert "error: --image-size 0: must be at least 1" in trained.logs


@pytest.fixture
def models(trained: Trained, tmp_path: Path) -> Path:
    """Returns a model volume with the model that the training Job published."""
    return Path(shutil.copytree(trained.models, tmp_path / "models"))


def publish(models: Path) -> None:
    """Publishes a second version as the trainer does: complete, by one rename."""
    shutil.copytree(models / "mnist/1", models / "mnist/.incoming")
    (models / "mnist/.incoming").rename(models / "mnist/2")


def versions_ready(pod: Pod, version: str) -> int:
    """Returns how many of a pod's workers have loaded a version."""
    return pod.text.count(f"mnist version {version} ready")


@pytest.mark.parametrize(
    ("overlay", "workers"),
    [
        pytest.param("prod-cpu", 1, marks=pytest.mark.minutes),  # native
        ("dev", 1),  # grpcio
        pytest.param("prod-cpu", 2, marks=pytest.mark.minutes),
    ],
)
def test_no_request_fails_while_all_pods_are_replaced_and_a_version_is_published(
    overlay: str, workers: int, has_namespaces: bool, models: Path, tmp_path: Path
) -> None:
    names = [f"serving-{number}" for number in range(2 * NUM_PODS)]
    with network([*names, "client"], namespaces=has_namespaces) as (*hosts, client):
        rollout = Rollout(overlay, hosts, client, models, tmp_path, workers=workers)
        first, second = rollout.pods[:NUM_PODS], rollout.pods[NUM_PODS:]
        rollout.start_pods(first)
        load = client.start(
            [sys.executable, str(Path(__file__).parent / "load.py"), rollout.target], {}, tmp_path / "load.log"
        )
        for pod in first:
            wait_for(f"a request to {pod.host.name}", lambda pod=pod: requests_of(pod) > 10)
        began = time.monotonic()
        rollout.start_pods(second[:1])
        publish(models)
        for pod in [*first[1:], second[0]]:
            wait_for(f"version 2 on {pod.host.name}", lambda pod=pod: versions_ready(pod, "2") == workers)
        wait_for("the client's next DNS lookup", lambda: time.monotonic() > began + DNS_S)
        ended = [rollout.remove(first[0])]
        ended += [rollout.replace(old, new) for old, new in zip(first[1:], second[1:], strict=True)]
        codes = [process.wait(120) for process in ended]
        for pod in second:
            wait_for(f"a request to {pod.host.name}", lambda pod=pod: requests_of(pod) > 10)
        load.stdin.close()
        assert load.wait(60) == 0
    summary = json.loads((tmp_path / "load.log").read_text().splitlines()[-1])
    assert summary["failed"] == []
    assert codes == [0, 0, 0], [pod.text for pod in first]
    assert set(summary["answered"]) == {"1", "2"}
    assert min(summary["answered"].values()) > 10
