"""A Slurm cluster of two hosts on this machine: munged, slurmctld and two slurmd, all on loopback.

Needs Debian's packages slurm-wlm and munge, which `install` fetches, and root.
"""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

CONFIG = """
ClusterName=convoy
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def install() -> None:
    """Installs Slurm, if it is not there."""
    if all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged", "sbatch")):
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    packages = ["apt-get", "install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]
    for command in (["apt-get", "update"], packages):
        subprocess.run(command, check=True, capture_output=True, env=environment, timeout=300)


class SlurmCluster:
    """A cluster whose processes belong to this one. Its commands need `SLURM_CONF`.

    Args:
        folder: for configuration, logs and state; a short path, as it holds a socket.
    """

    def __init__(self, folder: Path) -> None:
        self.config = folder / "slurm.conf"
        self._processes: list[subprocess.Popen[bytes]] = []
        (folder / "state").mkdir(parents=True)
        ports = [_free_port() for _ in range(3)]
        self.config.write_text(CONFIG.format(host=socket.gethostname(), folder=folder, ports=ports))
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        paths = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid")]
        seed = f"--seed-file={folder}/munge.seed"
        self._start("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *paths, seed)
        _wait(lambda: (folder / "munge.socket").exists(), "munged")
        self._start("slurmctld", "-D")
        for name in ("n1", "n2"):
            self._start("slurmd", "-D", "-N", name)
        _wait(lambda: self._num_idle() == 2, "both hosts")

    def close(self) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait()

    def _start(self, *command: str) -> None:
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = {**os.environ, "SLURM_CONF": str(self.config)}
        path = shutil.which(command[0]) or f"/usr/sbin/{command[0]}"
        self._processes.append(subprocess.Popen([path, *command[1:]], env=environment, **quiet))  # type: ignore[call-overload]

    def _num_idle(self) -> int:
        environment = {**os.environ, "SLURM_CONF": str(self.config)}
        command = ["sinfo", "--noheader", "--Node", "--format=%t"]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False).stdout.count(
            "idle"
        )


def _wait(is_there, what: str) -> None:  # type: ignore[no-untyped-def]
    until = time.monotonic() + 60
    while not is_there():
        assert time.monotonic() < until, f"{what} did not start"
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
