"""A small imitation of Kubernetes: starts pods from manifests, probes them and stops them.

The Job controller replaces failed pods by the manifest's podFailurePolicy; the kubelet takes preStop, the grace period
and the probes from the pod. Back-off, scheduling and everything else that takes time is left out.
"""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from protos import health_pb2
from tests.conftest import PATIENCE_S
from tests.deploy.manifests import Object, arguments, environment
from tests.hosts import Host


@dataclass
class Pod:
    """A container of a rendered pod, running on a host.

    Args:
        folders: where the container's mount paths are on this machine.
        extra: arguments after the manifest's.
    """

    host: Host
    spec: Object
    folders: Mapping[str, Path]
    log: Path
    index: int = 0
    extra: Sequence[str] = ()

    @property
    def container(self) -> Object:
        container: Object = self.spec["containers"][0]
        return container

    def start(self) -> subprocess.Popen[bytes]:
        words = [self._place(word) for word in arguments(self.container)]
        assert words[0] == "python", words
        job = self.host.name.rpartition("-")[0]  # a host is called like its pod: <Job>-<index>
        given = environment(self.container, self.index, job=job, address=self.host.address)
        values = {key: self._place(value) for key, value in given.items()}
        return self.host.start([sys.executable, *words[1:], *self.extra], values, self.log)

    @property
    def text(self) -> str:
        """The log of all its restarts."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def has_logged(self, words: str) -> bool:
        return words in self.text

    def _place(self, word: str) -> str:
        for mount, folder in self.folders.items():
            word = word.replace(mount, str(folder))
        return word


@dataclass
class JobController:
    """Runs an Indexed Job's pods to their end, or those of a JobSet's one Job, which all restart when one fails.

    Args:
        restarts_all: whether it is a JobSet's.
        failures: pods that counted towards backoffLimit.
        ignored: pods that did not.
        codes: exit codes in the order in which they were seen.
    """

    job: Object
    pods: Sequence[Pod]
    restarts_all: bool = False
    failures: int = 0
    ignored: int = 0
    codes: list[int] = field(default_factory=list)
    has_failed: bool = False
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self) -> None:
        for pod in self.pods:
            self.processes[pod.index] = pod.start()

    def run(self, timeout_s: float = PATIENCE_S) -> str:
        """Replaces failed pods until all have succeeded ("Complete"), or a rule or limit ends the Job ("Failed")."""
        until = time.monotonic() + timeout_s
        while self.processes and not self.has_failed:
            assert time.monotonic() < until, f"the Job is not done after {timeout_s:.0f} s: {self.codes}"
            self.reconcile()
            time.sleep(0.05)
        return "Failed" if self.has_failed else "Complete"

    def reconcile(self) -> int:
        """Replaces pods that have failed. Returns how many pods have ended so far."""
        for index, process in list(self.processes.items()):
            code = process.poll()
            if code is not None and self.processes.get(index) is process:
                self._handle_exit(index, 128 - code if code < 0 else code)
        return len(self.codes)

    def _handle_exit(self, index: int, code: int) -> None:
        self.codes.append(code)
        del self.processes[index]
        if code == 0:
            if any(rule["succeededIndexes"] == str(index) for rule in self._success_rules()):
                self._delete_pods()
            return
        action = self._action(code)
        self.ignored += action == "Ignore"
        self.failures += action == "Count"
        most = self.job["spec"]["backoffLimit"]
        self.has_failed |= action == "FailJob" or (self.failures > most and not self.restarts_all)
        if self.has_failed:
            return
        if self.restarts_all and action == "Count":
            self._delete_pods()
            self.start()
        else:
            self.processes[index] = self.pods[index].start()

    def _success_rules(self) -> list[Object]:
        rules: list[Object] = self.job["spec"].get("successPolicy", {}).get("rules", [])
        return rules

    def _delete_pods(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.wait(PATIENCE_S)
        self.processes.clear()

    def _action(self, code: int) -> str:
        for rule in self.job["spec"]["podFailurePolicy"]["rules"]:
            if code in rule.get("onExitCodes", {}).get("values", ()):
                return str(rule["action"])
        return "Count"


def answers(pod: Pod, probe: str) -> bool:
    """Runs one of the container's gRPC probes, as the kubelet does."""
    given = pod.container[f"{probe}Probe"]
    with grpc.insecure_channel(f"{pod.host.address}:{given['grpc']['port']}") as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            # Five times the manifest's, because this machine runs other tests at the same time.
            request = health_pb2.HealthCheckRequest(service=given["grpc"]["service"])
            return bool(check(request, timeout=5 * given["timeoutSeconds"]).status == 1)
        except grpc.RpcError:
            return False


def terminate(pod: Pod, process: subprocess.Popen[bytes]) -> threading.Thread:
    """Stops a pod as the kubelet does: preStop, SIGTERM, and SIGKILL when the grace period is over."""

    def end() -> None:
        began = time.monotonic()
        time.sleep(pod.container["lifecycle"]["preStop"]["sleep"]["seconds"])
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(pod.spec["terminationGracePeriodSeconds"] - (time.monotonic() - began))
        except subprocess.TimeoutExpired:
            process.kill()

    thread = threading.Thread(target=end)
    thread.start()
    return thread
