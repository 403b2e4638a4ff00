"""Runs the elastic overlay and the JobSet on hosts that are lost and come back."""

from pathlib import Path

import pytest

from tests.conftest import wait_for
from tests.deploy.training import Trained, build_job, service_names
from tests.hosts import network

pytestmark = pytest.mark.minutes


def test_an_elastic_run_goes_on_without_a_host_and_takes_its_replacement(has_namespaces: bool, tmp_path: Path) -> None:
    with network(["trainer-0", "trainer-1"], namespaces=has_namespaces) as hosts:
        options = ("--epochs=14", "--save-every-steps=50", "--no-export")
        job = build_job("train-elastic", hosts, tmp_path, *options, min_nodes=1, nodes=2)
        # The round without the lost host begins soon; the manifest waits half a minute for more hosts.
        variables = job.pods[0].container["env"]
        conf = next(entry for entry in variables if entry["name"] == "PET_RDZV_CONF")
        conf["value"] = conf["value"].replace("last_call_timeout=30", "last_call_timeout=2")
        for host in hosts:
            host.set_names(service_names(hosts))
        job.start()
        main, lost = job.pods
        logs = lambda: main.text + lost.text  # noqa: E731 (rank 0 may be on either)
        wait_for("the first epoch", lambda: "epoch 1/" in logs(), give_up=lambda: job.reconcile() > 0)
        assert "2 ranks on cpu" in logs()
        hosts[1].kill()
        wait_for("a smaller run", lambda: main.has_logged("1 rank on cpu"))
        assert job.processes[0].poll() is None
        job.reconcile()
        wait_for("a larger run", lambda: logs().count("2 ranks on cpu") == 2)
        trained = Trained.by(job, tmp_path)
    assert trained.outcome == "Complete", trained.logs
    assert trained.codes[:2] == [137, 0], trained.logs  # the pod of host 0 never ended, and its end completes the Job
    assert trained.failures == 1
    assert float(str(trained.result["test_accuracy"])) > 0.8


def test_a_jobset_restarts_all_hosts_when_one_is_killed(has_namespaces: bool, tmp_path: Path) -> None:
    with network(["trainer-node-0-0", "trainer-node-0-1"], namespaces=has_namespaces) as hosts:
        job = build_job("jobset", hosts, tmp_path, "--epochs=4", "--save-every-steps=20", "--gradient-reduction=ddp")
        for host in hosts:
            host.set_names(service_names(hosts))
        job.start()
        main = job.pods[0]
        wait_for("the first epoch", lambda: main.has_logged("epoch 1/"), give_up=lambda: job.reconcile() > 0)
        hosts[1].kill()
        trained = Trained.by(job, tmp_path)
    assert trained.outcome == "Complete", trained.logs
    assert trained.failures == 1, trained.codes
    assert trained.codes[-2:] == [0, 0]
    assert trained.logs.count(", saved in") == 1
    assert trained.result["exported"] == str(trained.models / "mnist" / "1")
