"""The rendered Job's own command lines, as on several hosts: ranks meet by name, hosts are lost and replaced."""

from pathlib import Path

import pytest

from tests.conftest import wait_for
from tests.deploy.training import Trained, build_job, service_names
from tests.hosts import network

pytestmark = pytest.mark.slow


def test_two_hosts_train_although_one_is_evicted_and_one_is_killed(trained: Trained) -> None:
    assert trained.outcome == "Complete", trained.logs
    assert trained.result["world_size"] == 2
    assert trained.result["num_test"] == 1000
    assert float(str(trained.result["test_accuracy"])) > 0.8


def test_an_evicted_hosts_peers_save_and_leave_with_it_and_it_costs_nothing(trained: Trained) -> None:
    assert trained.codes[:2] == [143, 143], trained.logs
    assert trained.ignored == 2


def test_a_killed_host_costs_failures_and_the_run_goes_on(trained: Trained) -> None:
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
        everyone = service_names(hosts)
        # Nobody, rank 0 included, knows where rank 0 is. (Without namespaces there is no DNS to be late.)
        late = {name: at for name, at in everyone.items() if "trainer-0" not in name}
        for host in hosts:
            host.tell(late if has_namespaces else everyone)
        job.start()
        if has_namespaces:
            for pod in job.pods[1:]:
                wait_for("a host to look in vain", lambda pod=pod: pod.said("trainer-0.trainer"))
            assert all(process.poll() is None for process in job.processes.values())
            for host in hosts:
                host.tell(everyone)
        trained = Trained.by(job, tmp_path)
    assert trained.outcome == "Complete", trained.logs
    assert trained.codes == [0] * 4, trained.logs
    assert trained.result["world_size"] == 4


def test_a_wrong_configuration_ends_the_job_at_once(has_namespaces: bool, tmp_path: Path) -> None:
    with network(["trainer-0", "trainer-1"], namespaces=has_namespaces) as hosts:
        job = build_job("pipeline", hosts, tmp_path, "--image-size=0")
        for host in hosts:
            host.tell(service_names(hosts))
        job.start()
        trained = Trained.by(job, tmp_path)
    assert trained.outcome == "Failed", trained.logs
    assert trained.codes[-1] == 2
    assert "error: --image-size 0: must be at least 1" in trained.logs
