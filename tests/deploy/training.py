"""Runs the rendered training Job on a few hosts."""

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.conftest import wait_for
from tests.deploy.cluster import JobController, Pod
from tests.deploy.manifests import COMPOSITIONS, Object, fields_of, render, render_fields
from tests.deploy.training_policy import jobs_of
from tests.hosts import Host, network

MINI = ("--dataset=mnist-mini", "--device=cpu")


@dataclass(frozen=True)
class Trained:
    """A finished Job and its results.

    Args:
        codes: exit codes of all its pods, in the order in which they ended.
        failures, ignored: the pods that its podFailurePolicy counted, and ignored.
        models: the model volume.
    """

    outcome: str
    codes: Sequence[int]
    failures: int
    ignored: int
    logs: str
    folder: Path

    @classmethod
    def by(cls, job: JobController, folder: Path) -> Self:
        """Runs the Job to its end."""
        outcome = job.run()
        logs = "\n".join(f"--- {pod.host.name}\n{pod.log.read_text()}" for pod in job.pods)
        return cls(outcome, job.codes, job.failures, job.ignored, logs, folder)

    @property
    def run_folder(self) -> Path:
        return self.folder / "training/runs/mnist"

    @property
    def models(self) -> Path:
        return self.folder / "models"

    @property
    def result(self) -> dict[str, object]:
        result: dict[str, object] = json.loads((self.run_folder / "result.json").read_text())
        return result


def build_job(overlay: str, hosts: Sequence[Host], folder: Path, *extra: str, **settings: int) -> JobController:
    """Returns an overlay's Job, or its JobSet's, on mnist-mini, with folders as volumes and a pod for each host.

    Args:
        settings: other values than the overlay's.
    """
    objects = render_with(overlay, settings) if settings else render(overlay)
    ((owner, spec),) = ((item["kind"], spec) for item in objects for spec in jobs_of(item))
    assert spec["completions"] == len(hosts)
    folders = {"/training": folder / "training", "/models": folder / "models"}
    for path in folders.values():
        path.mkdir(exist_ok=True)
    pods = [
        Pod(host, spec["template"]["spec"], folders, folder / f"{host.name}.log", index, (*MINI, *extra))
        for index, host in enumerate(hosts)
    ]
    return JobController({"spec": spec}, pods, restarts_all=owner == "JobSet")


def render_with(overlay: str, settings: Mapping[str, int]) -> Sequence[Object]:
    """Renders a copy of an overlay with other settings."""
    literals = [f"{name.replace('_', '-')}={value}" for name, value in settings.items()]
    merged = {"name": "settings", "behavior": "merge", "literals": literals}
    return render_fields(fields_of(COMPOSITIONS[overlay]) | {"configMapGenerator": [merged]})


def service_names(hosts: Sequence[Host]) -> dict[str, list[str]]:
    """Returns the DNS records of the headless Service."""
    return {f"{host.name}.trainer": [host.address] for host in hosts}


def train_through_losses(folder: Path, *, namespaces: bool) -> Trained:
    """Trains and publishes by DDP on two hosts; evicts one in the second epoch, and kills one after the restart."""
    with network(["trainer-0", "trainer-1"], namespaces=namespaces) as hosts:
        job = build_job("pipeline", hosts, folder, "--epochs=6", "--gradient-reduction=ddp")
        for host in hosts:
            host.set_names(service_names(hosts))
        job.start()
        main = job.pods[0]
        wait_for("the first epoch", lambda: main.has_logged("epoch 1/"), give_up=lambda: job.reconcile() > 0)
        job.processes[1].send_signal(signal.SIGTERM)
        wait_for("the end of both pods", lambda: job.reconcile() >= 2)
        wait_for("a resumed run", lambda: main.has_logged(", saved in"))
        hosts[1].kill()
        return Trained.by(job, folder)
