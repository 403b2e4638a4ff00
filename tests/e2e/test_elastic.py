"""An elastic run that loses a host and gets it back ends with the weights of an undisturbed run."""

import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.conftest import PATIENCE_S, ROOT, clean_environment, free_port, wait_for
from tests.e2e.test_training import result_of
from tests.hosts import Host, network

pytestmark = pytest.mark.minutes


class Agents:
    """A launcher on each host of one elastic run, whose rendezvous is on the first host.

    Args:
        launcher: its module.
    """

    def __init__(self, launcher: str, hosts: Sequence[Host], folder: Path, command: Sequence[str]) -> None:
        self._launcher = launcher
        self._main = hosts[0]
        self._endpoint = f"{hosts[0].address}:{free_port()}"
        self._folder = folder
        self._command = command
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, host: Host) -> "subprocess.Popen[bytes]":
        timing = "last_call_timeout=3,join_timeout=120,keep_alive_interval=2,keep_alive_max_attempt=3"
        elastic = ["--nnodes=1:4", "--nproc_per_node=1", "--max-restarts=20", "--rdzv-backend=c10d", "--rdzv-id=test"]
        elastic += [f"--rdzv-endpoint={self._endpoint}", f"--local-addr={host.address}"]
        elastic += [f"--rdzv-conf=is_host={int(host is self._main)},{timing}"]
        command = [sys.executable, "-m", self._launcher, *elastic, *self._command]
        self._running.append(host.start(command, clean_environment(), self._folder / f"{host.name}.log"))
        return self._running[-1]

    def wait_for_output(self, pattern: str, times: int = 1) -> None:
        """Waits until the pattern has appeared so many times in the output of all hosts together."""
        is_over = self._running[0].poll
        wait_for(pattern, lambda: len(re.findall(pattern, self.output)) >= times, lambda: is_over() is not None)

    @property
    def output(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self._folder.glob("host-*.log")))


def test_a_host_is_cut_off_and_returns(
    has_namespaces: bool, tmp_path: Path, data_dir: Path, run_trainer: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    # The run must be long enough for the fault: namespaces have a slow network, loopback needs more work.
    epochs = 1 if has_namespaces else 10
    options = ["--recipe", "mnist-fast", "--virtual-shards", "4", "--epochs", str(epochs), "--global-batch-size", "50"]
    options += ["--save-every-steps", "10", "--no-export"]
    arguments = ["--dataset", "mnist-mini", "--data-dir", str(data_dir), "--device", "cpu", *options]
    command = [str(ROOT / "trainer" / "main.py"), *arguments, "--run-dir", str(tmp_path / "run")]
    with network(["host-0", "host-1", "host-2"], namespaces=has_namespaces) as hosts:
        for host in hosts:
            host.limit_bandwidth()
        # A host that was cut off comes back by itself, and torchrun suffices; a host that was killed is started again.
        launcher = "torch.distributed.run" if has_namespaces else "trainer.launch"
        agents = Agents(launcher, hosts, tmp_path, command)
        first, _, lost = [agents.start(host) for host in hosts]
        try:
            agents.wait_for_output("3 ranks on cpu")
            wait_for("a checkpoint", lambda: any((tmp_path / "run" / "checkpoints").glob("step-*")))
            hosts[2].disconnect()
            disconnected_at = time.monotonic()
            agents.wait_for_output("error: .*rank 2 .*(lost|sent no heartbeat|hangs|gone)")
            assert time.monotonic() - disconnected_at < 10
            agents.wait_for_output("2 ranks on cpu")
            hosts[2].reconnect()
            if not has_namespaces:
                lost.wait()
                agents.start(hosts[2])
            agents.wait_for_output("3 ranks on cpu", times=2)
            for host in hosts:
                host.unlimit_bandwidth()
            assert first.wait(PATIENCE_S) == 0
        finally:
            print(agents.output)
    undisturbed = run_trainer(*options, "--run-dir", str(tmp_path / "undisturbed"))
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert result_of(tmp_path / "run")["weights_sha256"] == result_of(tmp_path / "undisturbed")["weights_sha256"]
