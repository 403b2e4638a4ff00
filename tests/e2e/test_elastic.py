"""Hosts that come and go: torchrun re-forms, and the run ends in the weights of one that nobody disturbed.

Hosts are network namespaces of this machine, joined by a bridge, with addresses of their own. That needs root and a
kernel that permits it, `ip` and `tc`; elsewhere these tests are skipped.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import ROOT, clean_environment
from tests.e2e.test_training import result_of

pytestmark = pytest.mark.slow

LIMIT_S = 240.0


class Hosts:
    """Network namespaces `NAME-0`, `NAME-1`, … with the addresses 10.77.0.1, 10.77.0.2, …"""

    def __init__(self, number: int) -> None:
        self.names = [f"cv{os.getpid() % 10000}h{host}" for host in range(number)]
        self.bridge = f"cv{os.getpid() % 10000}b"

    def make(self) -> None:
        ip("link", "add", self.bridge, "type", "bridge")
        ip("link", "set", self.bridge, "up")
        for host, name in enumerate(self.names):
            ip("netns", "add", name)
            ip("link", "add", f"{name}o", "type", "veth", "peer", "name", f"{name}i")
            ip("link", "set", f"{name}o", "master", self.bridge, "up")
            ip("link", "set", f"{name}i", "netns", name)
            ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", f"{name}i")
            for device in (f"{name}i", "lo"):
                ip("-n", name, "link", "set", device, "up")
            # A slow network makes a run long enough to be disturbed, without work for the processors.
            limit = ["rate", "4mbit", "burst", "32k", "latency", "400ms"]
            run("tc", "-n", name, "qdisc", "add", "dev", f"{name}i", "root", "tbf", *limit)

    def remove(self) -> None:
        for name in self.names:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)
        with suppress(subprocess.CalledProcessError):
            ip("link", "del", self.bridge)

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    def cut(self, host: int) -> None:
        ip("link", "set", f"{self.names[host]}o", "down")

    def mend(self, host: int) -> None:
        ip("link", "set", f"{self.names[host]}o", "up")

    def speed_up(self) -> None:
        """What was to happen on a slow network has happened."""
        for name in self.names:
            run("tc", "-n", name, "qdisc", "del", "dev", f"{name}i", "root")


def ip(*arguments: str) -> None:
    run("ip", *arguments)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if os.geteuid() != 0 or None in (shutil.which("ip"), shutil.which("tc")):
        pytest.skip("network namespaces need root and iproute2")
    hosts = Hosts(3)
    try:
        hosts.make()
    except subprocess.CalledProcessError as error:
        hosts.remove()
        pytest.skip(f"no network namespaces here: {error.stderr!r}")
    yield hosts
    hosts.remove()


class Agents:
    """A torchrun on each host, all of one elastic run. What they print goes to a file each."""

    def __init__(self, hosts: Hosts, folder: Path, command: list[str]) -> None:
        self._hosts = hosts
        self._folder = folder
        self._command = command
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, host: int) -> "subprocess.Popen[bytes]":
        elastic = ["--nnodes=1:4", "--nproc_per_node=1", "--max-restarts=20", "--rdzv-backend=c10d", "--rdzv-id=test"]
        elastic += [f"--rdzv-endpoint={self._hosts.address(0)}:29400", f"--local-addr={self._hosts.address(host)}"]
        timing = "last_call_timeout=3,join_timeout=120,keep_alive_interval=2,keep_alive_max_attempt=3"
        elastic += [f"--rdzv-conf=is_host={int(host == 0)},{timing}"]
        name = self._hosts.names[host]
        with self.log(host).open("ab") as log:
            agent = subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", *elastic, *self._command],
                env={**clean_environment(), "GLOO_SOCKET_IFNAME": f"{name}i"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._running.append(agent)
        return agent

    def log(self, host: int) -> Path:
        return self._folder / f"host-{host}.log"

    def wait_for(self, pattern: str, times: int = 1) -> None:
        """Until any host has said it so many times."""
        self.wait_until(lambda: len(re.findall(pattern, self.said())) >= times, f"{pattern!r} {times} times")

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < deadline, f"no {what}:\n{self.said()[-20000:]}"
            time.sleep(0.1)

    def said(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self._folder.glob("host-*.log")))

    def end(self) -> None:
        for agent in self._running:
            with suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()
        for name in self._hosts.names:
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True).stdout
            for pid in pids.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


def test_a_host_is_cut_off_and_comes_back(
    hosts: Hosts, tmp_path: Path, data_dir: Path, run_trainer: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    options = ["--recipe", "mnist-fast", "--virtual-shards", "4", "--epochs", "1", "--global-batch-size", "50"]
    options += ["--save-every-steps", "10", "--no-export"]
    known = ["--dataset", "mnist-mini", "--data-dir", str(data_dir), "--device", "cpu", *options]
    command = [str(ROOT / "trainer" / "main.py"), *known, "--run-dir", str(tmp_path / "run")]
    agents = Agents(hosts, tmp_path, command)
    try:
        first, _, cut_off = [agents.start(host) for host in range(3)]
        agents.wait_for("3 ranks on cpu")
        agents.wait_until(lambda: any((tmp_path / "run" / "checkpoints").glob("step-*")), "a checkpoint")
        hosts.cut(2)
        agents.wait_for("2 ranks on cpu")
        assert re.search(r"error: .*rank 2 .*(lost|gave no sign of life|hangs|gone)", agents.said()), agents.said()
        hosts.mend(2)
        if cut_off.poll() is not None:  # its torchrun gives up after a minute; else it comes back by itself
            agents.start(2)
        agents.wait_for("3 ranks on cpu", times=2)
        hosts.speed_up()
        assert first.wait(LIMIT_S) == 0, agents.said()
    finally:
        agents.end()
    whole = run_trainer(*options, "--run-dir", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    assert result_of(tmp_path / "run")["weights_sha256"] == result_of(tmp_path / "whole")["weights_sha256"]
